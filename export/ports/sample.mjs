#!/usr/bin/env node
/**
 * Draw samples from a bundle with Node and onnxruntime-node, with the web page's sampler:
 *
 *     npm install onnxruntime-node
 *     node sample.mjs BUNDLE --num_samples 1000 --seed 0 [--batch_size 512] [--output heart.csv [--overwrite]]
 *         [--class_labels CLASS …] [--condition NAME=VALUE …] [--guidance_scale W] [--known NAME=VALUE …] [--resample N]
 *
 * A flag with … is given once for each value: `--class_labels 3 --class_labels 7` draws NUM_SAMPLES of each.
 * Points and tables become CSV; `--output` with the ending .json, or images, become JSON: one array for each sample, of
 * images [height][width][channels], in the units of Python's `OnnxSampler.sample`. A table's CSV is that of
 * `ddpm-sample`; its arrays have one entry for each column: a number, true or false, text (also of dates), or null.
 * Its known cells are VALUEs as in the CSV, of `--condition` or `--known`.
 */

import { existsSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";
import {
  BundleError, oneLine, openBundle, parseCount, parseNumber, parseSeed, toCsv,
} from "../../ddpm_mlp_pipeline/export/web/ddpm.js";

/** Load onnxruntime-node from the current folder or NODE_PATH, since this file has no node_modules beside it. */
function loadRuntime() {
  try {
    return createRequire(join(process.cwd(), "here"))("onnxruntime-node");
  } catch (error) {
    throw new Error(`onnxruntime-node can't be loaded: ${oneLine(error)}; run npm install onnxruntime-node`);
  }
}

/** Return a flat array as nested arrays of a shape. */
function nest(values, [size, ...rest]) {
  if (rest.length === 0) return Array.from(values, (value) => Number(value.toPrecision(9)));
  const stride = values.length / size;
  return Array.from({ length: size }, (_, i) => nest(values.subarray(i * stride, (i + 1) * stride), rest));
}

function toCsvText(samples, { codec, info }) {
  return codec ? codec.toCsv(samples) : toCsv(samples, info.data_columns);
}

/** JSON with a line for each sample. */
function toJsonText(samples, { codec, isPoints, sampleShape, dimension }) {
  const [channels, height, width] = sampleShape, number = samples.length / dimension;
  const lists = codec
    ? Array.from({ length: number }, (_, row) => codec.cells(samples, row))
    : nest(samples, [number, ...(isPoints ? sampleShape : [height, width, channels])]);
  return `[\n${lists.map((sample) => JSON.stringify(sample)).join(",\n")}\n]\n`;
}

/** NAME=VALUE, several times, as one object. */
function parseValues(texts, flag) {
  return texts && Object.fromEntries(texts.map((text) => {
    const at = text.lastIndexOf("=");
    if (at < 1) throw new RangeError(`${flag} takes NAME=VALUE, not ${JSON.stringify(text)}`);
    return [text.slice(0, at), parseNumber(text.slice(at + 1), text.slice(0, at))];
  }));
}

/** A table's known cells, COLUMN=VALUE several times, as coordinates. A column's name may contain an equals sign. */
function parseCells(texts, codec) {
  return texts && codec.encode(Object.fromEntries(texts.map((text) => {
    const lengths = codec.names.filter((name) => text.startsWith(`${name}=`)).map((name) => name.length);
    const at = lengths.length ? Math.max(...lengths) : text.indexOf("=");
    if (at < 1) throw new RangeError(`known cells are NAME=VALUE, not ${JSON.stringify(text)}`);
    return [text.slice(0, at), text.slice(at + 1)];
  })));
}

/** What one asks for, and the number of samples: `numSamples` of each class. */
function parseAsked(values, numSamples, { classNames, codec }) {
  const { class_labels: classes = [], guidance_scale: scale, condition, known } = values;
  if (codec && condition && known) {
    throw new RangeError("of a table, --condition and --known are the same: give one of them");
  }
  const labels = classes.map((text) => (!classNames.includes(text) && /^\d+$/.test(text) ? Number(text) : text));
  const asked = {
    classLabels: labels.length > 1 ? labels.flatMap((label) => Array(numSamples).fill(label)) : labels[0],
    condition: codec ? undefined : parseValues(condition, "--condition"),
    guidanceScale: scale === undefined ? undefined : parseNumber(scale, "--guidance_scale"),
    known: codec ? parseCells(condition ?? known, codec) : parseValues(known, "--known"),
    resample: parseNumber(values.resample, "--resample"),
  };
  return [asked, numSamples * Math.max(1, labels.length)];
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      num_samples: { type: "string", default: "1" },
      seed: { type: "string", default: "0" },
      batch_size: { type: "string", default: "512" },
      class_labels: { type: "string", multiple: true },
      condition: { type: "string", multiple: true },
      guidance_scale: { type: "string" },
      known: { type: "string", multiple: true },
      resample: { type: "string", default: "1" },
      output: { type: "string" },
      overwrite: { type: "boolean", default: false },
    },
  });
  if (positionals.length !== 1) {
    throw new Error(
      "usage: sample.mjs BUNDLE [--num_samples N] [--seed S] [--batch_size N] [--output FILE [--overwrite]] " +
        "[--class_labels CLASS …] [--condition NAME=VALUE …] [--guidance_scale W] [--known NAME=VALUE …] " +
        "[--resample N], where a flag with … is repeated for each value",
    );
  }
  if (values.output && !values.overwrite && existsSync(values.output)) {
    throw new Error(`${values.output} exists: pass --overwrite to replace it`);
  }
  const number = parseCount(values.num_samples), seed = parseSeed(values.seed);
  const batchSize = parseCount(values.batch_size);
  const sampler = await openBundle(loadRuntime(), async (name) => {
    try {
      return await readFile(join(positionals[0], name));
    } catch (error) {
      throw new BundleError(`${positionals[0]} is not a bundle: ${name} can't be read: ${error.code}`);
    }
  });
  const [asked, numSamples] = parseAsked(values, number, sampler);

  const samples = new Float32Array(numSamples * sampler.dimension);
  let place = 0;
  for await (const batch of sampler.batches(numSamples, seed, batchSize, asked)) {
    samples.set(batch, place);
    place += batch.length;
  }
  const isCsv = sampler.isPoints && !values.output?.endsWith(".json");
  const text = isCsv ? toCsvText(samples, sampler) : toJsonText(samples, sampler);
  if (values.output) await writeFile(values.output, text, { flag: values.overwrite ? "w" : "wx" });
  else process.stdout.write(text);
}

main().catch((error) => {
  console.error(`error: ${oneLine(error)}`);
  process.exitCode = 1;
});
