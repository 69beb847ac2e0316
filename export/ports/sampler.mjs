#!/usr/bin/env node
// Draw samples from a bundle's sampler.onnx (ddpm-export … --sampler) with onnxruntime-node alone:
//
//     npm install onnxruntime-node
//     node sampler.mjs BUNDLE/sampler.onnx NUM_SAMPLES SEED

import { createRequire } from "node:module";
import { join } from "node:path";

const ort = createRequire(join(process.cwd(), "here"))("onnxruntime-node"); // from the current folder
const [network, numSamples, seed] = process.argv.slice(2);
const scalar = (number) => new ort.Tensor("int64", BigInt64Array.of(BigInt(number)), []);

const session = await ort.InferenceSession.create(network);
const { samples } = await session.run({ seed: scalar(seed), num_samples: scalar(numSamples) });
console.log(JSON.stringify({ shape: samples.dims, data: Array.from(samples.data) }));
