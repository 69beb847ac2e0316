#!/usr/bin/env node
// Draw samples from a bundle's sampler.onnx (ddpm-export … --sampler) with onnxruntime-node alone:
//
//     npm install onnxruntime-node
//     node sampler.mjs BUNDLE/sampler.onnx NUM_SAMPLES SEED [LABELS [GUIDANCE_SCALE]]
//
// LABELS is a class's number, or a list such as [0,2,1] with one for each sample, and needed if the network takes labels.
// The bundle's null_label stands for any class. FORMAT.md says how to draw labels as Python does.

import { createRequire } from "node:module";
import { join } from "node:path";

const ort = createRequire(join(process.cwd(), "here"))("onnxruntime-node"); // from where the command is run
const [network, numSamples, seed, labels, guidanceScale] = process.argv.slice(2);
const n = Number(numSamples), scalar = (number) => new ort.Tensor("int64", BigInt64Array.of(BigInt(number)), []);
const filled = (name, value) => {
  const shape = [n, ...session.inputMetadata.find((input) => input.name === name).shape.slice(1)];
  return new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)).fill(value), shape);
};

const session = await ort.InferenceSession.create(network);
if (guidanceScale !== undefined && !session.inputNames.includes("guidance_scale")) {
  throw new Error("this sampler takes no GUIDANCE_SCALE: it can't be guided, or each call has its own");
}
const inputs = {
  seed: () => scalar(seed),
  num_samples: () => scalar(numSamples),
  class_labels: () => {
    if (labels === undefined) throw new Error("this network takes labels: name LABELS");
    const each = [JSON.parse(labels)].flat();
    return new ort.Tensor("int64", BigInt64Array.from({ length: n }, (_, i) => BigInt(each[i % each.length])), [n]);
  },
  guidance_scale: () => new ort.Tensor("float32", Float32Array.of(Number(guidanceScale ?? 1)), []),
  condition: () => filled("condition", NaN), // none
  known: () => filled("known", 0),
  mask: () => filled("mask", 0), // nothing is known
};
const feeds = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]()]));
const { samples } = await session.run(feeds);
console.log(JSON.stringify({ shape: samples.dims, data: Array.from(samples.data) }));
