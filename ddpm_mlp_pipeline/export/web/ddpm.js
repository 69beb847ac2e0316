/**
 * Sample from a bundle as export/FORMAT.md describes, in a browser with onnxruntime-web or in Node with
 * onnxruntime-node.
 */

import { TableCodec } from "./columns.js";

export const MAX_SEED = 2n ** 63n - 1n;
// The format and the supported versions
const FORMATS = { "bundle.json": ["ddpm-bundle", 1, 2], "step_table.json": ["ddpm-step-table", 2, 3] };
const INPUTS = ["sample", "timestep"], OPTIONAL_INPUTS = ["class_labels", "condition"]; // of the network, in order
const MAX_SIZE = 2 ** 26; // of a sample, in numbers
const MAX_FLOAT = 3.4028234e38;

/** A bundle's file is missing, not readable or doesn't fit the other files. The message is one line. */
export class BundleError extends Error {}

/**
 * @typedef {object} DenoisingStep One network evaluation; arrays are float32 `[numSamples, ...sampleShape]`.
 * @property {number} index number of the step, from 0
 * @property {number} timestep timestep given to the network
 * @property {Float32Array} x the network's input
 * @property {Float32Array} eps its output, after guidance
 * @property {Float32Array | undefined} x0 the clipped prediction of x_0, if the table clips
 * @property {Float32Array | undefined} z the noise drawn, if the table uses any, scaled by a learned variance
 * @property {Float32Array | undefined} zKnown the noise of known values, if there are any; none in the last step
 * @property {Float32Array} sample the network's next input; after the last step, the sample in the network's units
 */

/**
 * @typedef {object} Asked What to draw: one value for all samples, or one for each, in nested or flat lists.
 * @property {string | number | (string | number)[]} [classLabels] names or numbers; where nothing is asked, drawn from
 *   the bundle's `class_shares`, if it has them; else by default the null label, "any class"
 * @property {Object<string, number> | number[]} [condition] in its own units, by name or in the columns' order
 * @property {number} [guidanceScale] w, by default the table's; 1 is no guidance
 * @property {[number, number]} [guidanceInterval] [tHigh, tLow], the timesteps to guide at
 * @property {Object<string, number> | number[]} [known] points in the data's units, by name or with NaN for what is
 *   to be drawn; images in [0, 1], `[height, width, channels]`
 * @property {ArrayLike<number | boolean>} [mask] true where `known` is known: a point's shape, or `[height, width]`
 * @property {number} [resample] how often each step is taken
 */

// Noise: Philox-4×32-10 (Salmon et al. 2011) and Box and Muller's transform

/** Return the upper 32 bits of a product of 32-bit words, from 16-bit halves: a 64-bit product exceeds a double. */
function multiplyHigh(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  return a1 * b1 + (middle >>> 16) + ((a0 * b1 + (middle & 0xffff)) >>> 16);
}

/**
 * Apply Philox-4×32-10 to the key (k0, k1) and the counter (c0, c1, c2, c3).
 * @param {Uint32Array} out array for the four words of the result
 */
export function philox(out, k0, k1, c0, c1, c2 = 0, c3 = 0) {
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, c0), low0 = Math.imul(0xd2511f53, c0);
    const high1 = multiplyHigh(0xcd9e8d57, c2), low1 = Math.imul(0xcd9e8d57, c2);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) | 0;
    k1 = (k1 + 0xbb67ae85) | 0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

const UNIT = 2 ** -24;
const ANGLE = Math.fround(UNIT * Math.fround(2 * Math.PI));

/** Turn two words into two normals, rounded to float32 in the same places as in numpy, for the same angle. */
function boxMuller(a, b, out, place) {
  const u = ((a >>> 8) + 1) * UNIT; // in (0, 1]
  const angle = Math.fround((b >>> 8) * ANGLE);
  const radius = Math.fround(Math.sqrt(-2 * Math.fround(Math.log(u))));
  out[place] = radius * Math.fround(Math.cos(angle));
  out[place + 1] = radius * Math.fround(Math.sin(angle));
}

/**
 * Draw standard normals. Each sample has its own stream, in which draw k is at k · dimension … (k + 1) · dimension − 1.
 * @param {bigint} seed in [0, 2⁶³)
 * @param {number} first index of the first sample
 * @param {number} numSamples
 * @param {number} dimension numbers in a sample
 * @param {number} draw 0 is the initial sample, k + 1 the noise of call k; in stream 1, k is that of the known values
 * @param {number} stream
 * @returns {Float32Array} `[numSamples, dimension]`
 */
export function normal(seed, first, numSamples, dimension, draw, stream = 0) {
  const k0 = Number(seed & 0xffffffffn), k1 = Number(seed >> 32n);
  const start = draw * dimension, firstBlock = Math.floor(start / 4), lastBlock = Math.ceil((start + dimension) / 4);
  const words = new Uint32Array(4), numbers = new Float32Array(4 * (lastBlock - firstBlock));
  const normals = new Float32Array(numSamples * dimension);
  for (let i = 0; i < numSamples; i++) {
    for (let block = firstBlock; block < lastBlock; block++) {
      philox(words, k0, k1, block, first + i, stream);
      boxMuller(words[0], words[1], numbers, 4 * (block - firstBlock));
      boxMuller(words[2], words[3], numbers, 4 * (block - firstBlock) + 2);
    }
    const offset = start - 4 * firstBlock;
    normals.set(numbers.subarray(offset, offset + dimension), i * dimension);
  }
  return normals;
}

/**
 * Draw a label for each sample, from stream 2.
 * @param {bigint} seed in [0, 2⁶³)
 * @param {number} first index of the first sample
 * @param {number} numSamples
 * @param {number[]} classShares probability of each class; they sum to 1
 * @returns {BigInt64Array} `[numSamples]`
 */
export function drawLabels(seed, first, numSamples, classShares) {
  const k0 = Number(seed & 0xffffffffn), k1 = Number(seed >> 32n), words = new Uint32Array(4);
  let sum = 0;
  const thresholds = classShares.map((share) => Math.floor((sum += share) * 2 ** 32));
  thresholds.pop(); // the last class takes what rounding leaves
  return BigInt64Array.from({ length: numSamples }, (_, i) => {
    philox(words, k0, k1, 0, first + i, 2);
    return BigInt(thresholds.filter((threshold) => threshold <= words[0]).length);
  });
}

// Input of the user

/** Parse a seed as a bigint in 0 … MAX_SEED. @throws {RangeError} */
export function parseSeed(text) {
  const seed = /^\s*\d{1,30}\s*$/.test(text) ? BigInt(text) : -1n;
  if (seed < 0n || seed > MAX_SEED) {
    throw new RangeError(`The seed must be a whole number from 0 to ${MAX_SEED}, not ${quote(text)}.`);
  }
  return seed;
}

/** Parse a number in 1 … most. @throws {RangeError} */
export function parseCount(text, most = Number.MAX_SAFE_INTEGER) {
  const count = /^\s*\d{1,30}\s*$/.test(text) ? Number(text) : 0;
  if (count < 1 || count > most) {
    throw new RangeError(`The number of samples must be a whole number from 1 to ${most}, not ${quote(text)}.`);
  }
  return count;
}

/**
 * @param {string} text
 * @param {string} name what the number is
 * @returns {number}
 * @throws {RangeError} with one line
 */
export function parseNumber(text, name) {
  const number = text.trim() === "" ? NaN : Number(text);
  if (!Number.isFinite(number)) throw new RangeError(`${name} must be a finite number, not ${quote(text)}`);
  return number;
}

const quote = (text) => JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);

// The bundle's files

function parseJson(name, bytes) {
  let content;
  try {
    content = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new BundleError(`${name} is not valid JSON: ${error.message}`);
  }
  const [format, ...versions] = FORMATS[name];
  if (content?.format !== format || !versions.includes(content.version)) {
    throw new BundleError(`${name} is not of the format ${format}, version ${versions.join(" or ")}`);
  }
  return content;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const areNumbers = (value, length) => Array.isArray(value) && value.length === length && value.every(isNumber);

const isName = (value) => typeof value === "string";

/** Return the coding of a table's columns, or null for samples that are no table's rows. */
function codecOf({ columns = null }) {
  try {
    return columns === null ? null : new TableCodec(columns);
  } catch (error) {
    throw new BundleError(`bundle.json: columns: ${error.message}`);
  }
}

/** @throws {BundleError} */
export function parseInfo(bytes) {
  const fail = (message) => { throw new BundleError(`bundle.json: ${message}`); };
  const info = parseJson("bundle.json", bytes);
  const shape = info.sample_shape;
  const isShape = Array.isArray(shape) && [1, 3].includes(shape.length);
  if (!isShape || !shape.every((size) => Number.isInteger(size) && size > 0) || sizeOf(shape) > MAX_SIZE) {
    fail("sample_shape must be [dimension] or [channels, height, width]");
  }
  const checkColumns = (kind, number) => {
    for (const name of [`${kind}_mean`, `${kind}_std`]) {
      if (!areNumbers(info[name], number) || !info[name].every((value) => Math.abs(value) < MAX_FLOAT)) {
        fail(`${name} must hold ${number} finite numbers`);
      }
    }
    const columns = info[`${kind}_columns`];
    if (!number || !Array.isArray(columns) || columns.length !== number || !columns.every(isName)) {
      fail(`${kind}_columns must hold ${number} names`);
    }
  };
  if (shape.length === 1) checkColumns("data", shape[0]);
  const coordinates = codecOf(info)?.coordinateNames;
  const isTheirs = shape.length === 1 && coordinates?.every((name, i) => name === info.data_columns[i]);
  if (coordinates && !(isTheirs && coordinates.length === shape[0])) {
    fail("the coordinates of columns are not the data_columns");
  }
  const { inputs = INPUTS, sha256 = {} } = info;
  const further = OPTIONAL_INPUTS.filter((name) => info.version > 1 && Array.isArray(inputs) && inputs.includes(name));
  if (!Array.isArray(inputs) || inputs.join() !== [...INPUTS, ...further].join()) {
    fail(`the network has the inputs ${inputs}, but this version supports only ${[...INPUTS, ...OPTIONAL_INPUTS]}`);
  }
  const { condition_is_known: isKnown = false } = info;
  if (typeof isKnown !== "boolean") fail("condition_is_known must be true or false");
  if (isKnown && !(inputs.includes("condition") && shape.length === 1)) {
    fail("condition_is_known is for points, and needs the input condition");
  }
  if (inputs.includes("condition") && !isKnown) {
    if (!Array.isArray(info.condition_columns)) fail("condition_columns must be a list of names");
    checkColumns("condition", info.condition_columns.length);
  }
  if (inputs.includes("class_labels")) {
    const { class_names: names, null_label: label, class_shares: shares = null } = info;
    if (!Array.isArray(names) || !names.length || !names.every(isName)) fail("class_names must be a list of names");
    if (label !== null && !(Number.isInteger(label) && label >= 0 && label <= names.length)) {
      fail(`null_label must be a whole number from 0 to ${names.length}, or null`);
    }
    const areShares = shares === null || (areNumbers(shares, names.length) && shares.every((share) => share >= 0));
    if (!areShares || (shares && Math.abs(shares.reduce((a, b) => a + b) - 1) >= 1e-6)) {
      fail(`class_shares must hold ${names.length} numbers that sum to 1, or be null`);
    }
  }
  if (typeof sha256 !== "object" || sha256 === null || Array.isArray(sha256)) {
    fail("sha256 must be an object of file names and checksums");
  }
  const [names, columns] = OPTIONAL_INPUTS.map((name, i) => {
    return inputs.includes(name) && !(i && isKnown) ? info[["class_names", "condition_columns"][i]] : [];
  });
  return { ...info, inputs, class_names: names, condition_columns: columns };
}

/**
 * @typedef {object} Table
 * @property {string} scheduler
 * @property {number} initialScale
 * @property {number | null} clipRange
 * @property {{timestep: number, toX0: number[], toNext: number[][], isStochastic: boolean, guidanceScale: number,
 *   alphaCumprod?: number, logVariance?: [number, number]}[]} steps the last two in all steps, or in none
 */

/**
 * @returns {Table}
 * @throws {BundleError}
 */
export function parseTable(bytes) {
  const fail = (message) => { throw new BundleError(`step_table.json: ${message}`); };
  const content = parseJson("step_table.json", bytes);
  const { initial_scale: initialScale, clip_range: clipRange, steps } = content;
  if (!isNumber(initialScale) || initialScale <= 0) fail("initial_scale must be a positive number");
  if (clipRange !== null && (!isNumber(clipRange) || clipRange <= 0)) {
    fail("clip_range must be a positive number or null");
  }
  if (!Array.isArray(steps) || steps.length === 0) fail("steps must be a list of at least one step");
  // All steps have a key of version 3, or none has it.
  const [hasAlpha, hasScale, hasVariance] = ["alpha_cumprod", "guidance_scale", "log_variance"].map(
    (key) => content.version > 2 && steps[0]?.[key] !== undefined,
  );
  const rows = steps.map((step, k) => {
    if (!isNumber(step?.timestep)) fail(`step ${k}'s timestep must be a finite number`);
    if (!areNumbers(step.to_x_0, 2)) fail(`step ${k}'s to_x_0 must hold 2 finite numbers`);
    const toNext = step.to_next;
    if (!Array.isArray(toNext) || toNext.length === 0 || !toNext.every((row) => areNumbers(row, 4))) {
      fail(`step ${k}'s to_next must hold rows of 4 finite numbers`);
    }
    if (clipRange === null && toNext.some((row) => row[2] !== 0)) fail(`step ${k} uses x_0, but clip_range is null`);
    if (toNext.slice(k + 1).flat().some((coefficient) => coefficient !== 0)) {
      fail(`step ${k} can't use values from before step 0`);
    }
    const { alpha_cumprod: alphaCumprod, guidance_scale: guidanceScale, log_variance: logVariance } = step;
    if (hasAlpha && !(isNumber(alphaCumprod) && alphaCumprod >= 0 && alphaCumprod <= 1)) {
      fail(`step ${k}'s alpha_cumprod must be a number from 0 to 1`);
    }
    if (hasScale && !isNumber(guidanceScale)) fail(`step ${k}'s guidance_scale must be a finite number`);
    if (hasVariance && !areNumbers(logVariance, 2)) fail(`step ${k}'s log_variance must hold 2 finite numbers`);
    return {
      timestep: step.timestep,
      toX0: step.to_x_0,
      toNext: toNext.slice(0, k + 1),
      guidanceScale: hasScale ? guidanceScale : 1,
      ...(hasAlpha && { alphaCumprod }),
      ...(hasVariance && { logVariance }),
    };
  });
  return { scheduler: String(content.scheduler), initialScale, clipRange, steps: withNoise(rows) };
}

/** Set `isStochastic`: a step draws noise if it or a later step uses that noise. */
function withNoise(steps) {
  const marked = steps.map((step) => ({ ...step, isStochastic: false }));
  steps.forEach(({ toNext }, k) => toNext.forEach((row, i) => { marked[k - i].isStochastic ||= row[3] !== 0; }));
  return marked;
}

/**
 * Return the table with another guidance.
 * @param {Table} table
 * @param {number} scale
 * @param {[number, number]} interval [tHigh, tLow]
 * @returns {Table}
 */
export function guided(table, scale, [tHigh, tLow] = [Infinity, -Infinity]) {
  const scaleAt = (t) => (t <= tHigh && t >= tLow ? scale : 1);
  return { ...table, steps: table.steps.map((step) => ({ ...step, guidanceScale: scaleAt(step.timestep) })) };
}

/**
 * Return the table that takes each step several times, and in between returns to the timestep's noise: RePaint's
 * resampling (Lugmayr et al. 2022, algorithm 1, with jumps of one step).
 * @param {Table} table
 * @param {number} times
 * @returns {Table}
 * @throws {BundleError}
 */
export function repeated(table, times) {
  if (times === 1) return table;
  const { steps } = table;
  if (steps[0].alphaCumprod === undefined) {
    throw new BundleError("a step table without alphas_cumprod can't be resampled: export the bundle again");
  }
  if (steps.some(({ toNext, logVariance }) => logVariance || toNext.slice(1).some((row) => row[3] !== 0))) {
    throw new BundleError(
      `${table.scheduler}'s steps can't be resampled: their noise is learned or comes from earlier steps`,
    );
  }
  const rows = steps.flatMap((step, k) => {
    const alpha = step.alphaCumprod, alphaNext = steps[k + 1]?.alphaCumprod ?? 1;
    const share = Math.sqrt(alpha / alphaNext), variance = Math.max(1 - alpha - share ** 2 * (1 - alphaNext), 0);
    return Array.from({ length: times }, (_, j) => {
      // Row i > 0 belongs to the last time that the call i before this one was made.
      const toNext = [step.toNext[0]];
      step.toNext.slice(1).forEach((row, i) => { toNext[i * times + j + 1] = row; });
      const again = j < times - 1;
      const all = Array.from(toNext, (row) => (row ?? [0, 0, 0, 0]).map((value) => (again ? share * value : value)));
      if (again) all[0][3] = Math.sqrt(all[0][3] ** 2 + variance); // two independent noises are one
      return { ...step, toNext: all };
    });
  });
  return { ...table, steps: withNoise(rows) };
}

// What one asks of samples

/** Flatten lists of any depth and typed arrays. */
function flat(values) {
  if (ArrayBuffer.isView(values)) return Array.from(values);
  return Array.isArray(values) ? values.flatMap(flat) : [values];
}

const fail = (message) => { throw new RangeError(message); };

/** Return the number of a class. */
function classOf({ class_names: names, null_label: nullLabel }, label) {
  if (isName(label)) {
    const shown = names.length <= 20 ? names : [...names.slice(0, 20), "…"];
    if (!names.includes(label)) fail(`there is no class '${label}', only ${shown.join(", ")}`);
    return names.indexOf(label);
  }
  if ((Number.isInteger(label) && label >= 0 && label < names.length) || (label === nullLabel && label !== null)) {
    return label;
  }
  return fail(`class_labels must be names, or numbers from 0 to ${names.length - 1}, got ${label}`);
}

/** Return values, given by name or in the columns' order, as one list. Known columns without a name are NaN. */
function byName(values, columns, what) {
  if (Array.isArray(values) || ArrayBuffer.isView(values) || typeof values !== "object") return flat(values);
  const unknown = Object.keys(values).find((name) => !columns.includes(name));
  if (unknown !== undefined) fail(`${what} has no column '${unknown}', only ${columns.join(", ")}`);
  const missing = columns.find((name) => !Object.hasOwn(values, name));
  if (what === "condition" && missing !== undefined) fail(`the condition lacks '${missing}'`);
  return columns.map((name) => (Object.hasOwn(values, name) ? values[name] : NaN));
}

/** Return the network's optional inputs, with one row for all samples or one for each. */
function inputsOf(info, numSamples, classLabels, condition) {
  const inputs = {};
  if (info.inputs.includes("class_labels")) {
    const labels = classLabels ?? info.null_label;
    if (labels === null) fail(`this network needs class_labels: ${info.class_names.join(", ")}`);
    const numbers = flat(labels).map((label) => classOf(info, label));
    if (numbers.length !== 1 && numbers.length !== numSamples) {
      fail(`class_labels must be one, or ${numSamples}, got ${numbers.length}`);
    }
    inputs.class_labels = BigInt64Array.from(numbers, BigInt);
  } else if (classLabels != null) fail("class_labels: this network knows no classes");
  if (info.inputs.includes("condition") && !info.condition_is_known) {
    const { condition_columns: columns, condition_mean: mean, condition_std: std } = info;
    const values = condition == null ? columns.map(() => NaN) : byName(condition, columns, "condition");
    const isOf = [1, numSamples].some((rows) => values.length === rows * columns.length);
    if (condition != null && !(isOf && values.every(isNumber))) {
      fail(
        `condition must hold finite numbers, ${columns.length} (${columns.join(", ")}) for all samples ` +
          `or for each of ${numSamples}`,
      );
    }
    inputs.condition = Float32Array.from(values, (v, i) => (v - mean[i % mean.length]) / std[i % std.length]);
  } else if (condition != null) fail("condition: this network takes no condition");
  return inputs;
}

/** Return y in the network's units and m, `[rows, ...sampleShape]`, with one row for all samples or one for each. */
function knownOf(info, numSamples, known, mask) {
  if (known == null) return mask == null ? {} : fail("a mask needs known values");
  const shape = info.sample_shape, dimension = sizeOf(shape), isPoints = shape.length === 1;
  if (!isPoints && mask == null) fail("known images need a mask, which is true where they are known");
  const values = isPoints ? byName(known, info.data_columns, "known") : flat(known);
  if (!values.every((value) => typeof value === "number")) fail("known must hold numbers");
  const flags = mask == null ? values.map((value) => !Number.isNaN(value)) : flat(mask);
  const [channels, ...size] = shape, pixels = sizeOf(size), maskSize = isPoints ? dimension : pixels;
  for (const [what, length, each] of [["known", values.length, dimension], ["the mask", flags.length, maskSize]]) {
    if (length !== each && length !== numSamples * each) {
      fail(`${what} must hold ${each} numbers, or that for each of ${numSamples} samples, got ${length}`);
    }
  }
  const rows = Math.max(values.length / dimension, flags.length / maskSize);
  const y = new Float32Array(rows * dimension), m = new Float32Array(rows * dimension);
  for (let i = 0; i < y.length; i++) {
    const row = Math.floor(i / dimension), place = i % dimension, pixel = place % pixels;
    if (!flags[(row * maskSize + (isPoints ? place : pixel)) % flags.length]) continue;
    const from = isPoints ? place : pixel * channels + Math.floor(place / pixels);
    const value = values[(row * dimension + from) % values.length];
    if (!isNumber(value)) fail("known values must be finite where the mask says that they are known");
    y[i] = isPoints ? (value - info.data_mean[place]) / info.data_std[place] : 2 * value - 1;
    m[i] = 1;
  }
  return { y, m };
}

/**
 * Check what is asked against what a bundle knows.
 * @param {object} info
 * @param {Table} table
 * @param {number} numSamples
 * @param {Asked} asked
 * @returns {{table: Table, inputs: object, nulls: object, y?: Float32Array, m?: Float32Array, classShares?: number[]}}
 *   the table to draw by, and the network's further inputs, what stands for nothing in them, and known values and their
 *   mask, with one row for all samples or one for each; and the probabilities of the labels that are drawn
 * @throws {RangeError} with one line
 */
function resolve(info, table, numSamples, asked = {}) {
  const { classLabels, condition, guidanceScale, guidanceInterval, known, mask, resample = 1, ...others } = asked;
  for (const name of Object.keys(others)) fail(`one can't ask for ${name}`);
  if (!Number.isInteger(resample) || resample < 1) {
    fail(`resample must be a whole number of at least 1, got ${resample}`);
  }
  const isNothingAsked = [classLabels, condition, known].every((values) => values == null);
  const takesLabels = info.inputs.includes("class_labels");
  const classShares = (takesLabels && isNothingAsked && info.class_shares) || undefined;
  // If labels are drawn, the label 0 is in their place.
  const inputs = inputsOf(info, numSamples, classShares ? 0 : classLabels, condition);
  const { y, m } = knownOf(info, numSamples, known, mask);
  if (info.condition_is_known) {
    inputs.condition = m ? y.map((value, i) => (m[i] ? value : NaN)) : new Float32Array(info.sample_shape[0]).fill(NaN);
  }
  if (guidanceScale != null) {
    if (!isNumber(guidanceScale)) fail(`guidance_scale must be a finite number, got ${guidanceScale}`);
    if (guidanceInterval != null) {
      if (!areNumbers(guidanceInterval, 2)) fail("guidance_interval must be 2 finite numbers");
      const [tHigh, tLow] = guidanceInterval;
      if (tHigh < tLow) fail(`guidance_interval must be (t_high, t_low), got (${tHigh}, ${tLow})`);
    }
    table = guided(table, guidanceScale, guidanceInterval ?? undefined);
  } else if (guidanceInterval != null) fail("guidance_interval needs a guidance_scale");
  const nulls = {};
  if (table.steps.some((step) => step.guidanceScale !== 1)) {
    if (!Object.keys(inputs).length) fail("guidance_scale needs a network that takes labels or conditions");
    if (inputs.class_labels && info.null_label === null) {
      fail("guidance_scale needs a network with a null label (ddpm-export --null_label)");
    }
    if (inputs.class_labels) nulls.class_labels = BigInt64Array.of(BigInt(info.null_label));
    if (inputs.condition) nulls.condition = new Float32Array(conditionSize(info)).fill(NaN);
  }
  if (y && table.steps[0].alphaCumprod === undefined) {
    fail("this bundle's step table takes no known values: export the checkpoint again");
  }
  return { table: repeated(table, resample), inputs, nulls, y, m, classShares };
}

/** The number of values of a condition. */
const conditionSize = (info) => (info.condition_is_known ? info.sample_shape[0] : info.condition_columns.length);

/** The rows of some samples, of values with one row for all samples or one for each. */
function rowsOf(values, size, first, number) {
  if (values.length > size) return values.slice(first * size, (first + number) * size);
  const rows = new values.constructor(number * size);
  for (let i = 0; i < number; i++) rows.set(values, i * size);
  return rows;
}

function concatenated(a, b) {
  const both = new a.constructor(a.length + b.length);
  both.set(a);
  both.set(b, a.length);
  return both;
}

/**
 * Compare a file with its checksum in bundle.json, if there is one. Pages served by plain http from another machine
 * have no crypto.subtle and skip the check.
 * @throws {BundleError}
 */
async function checkSum(name, bytes, expected) {
  const subtle = globalThis.crypto?.subtle;
  if (expected === undefined || subtle === undefined) return;
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== expected) {
    throw new BundleError(`${name} is damaged or from another bundle: its SHA-256 differs from bundle.json's`);
  }
}

function checkNetwork(session, { inputs, sample_shape: sampleShape }, learnsVariance) {
  const names = [...session.inputNames, ...session.outputNames];
  if ([...names].sort().join() !== [...inputs, "out_sample"].sort().join()) {
    throw new BundleError(
      `unet.onnx must have the inputs ${inputs.join(", ")} and the output out_sample, but has ${names.join(", ")}`,
    );
  }
  const [channels, ...size] = sampleShape;
  const shapes = { sample: sampleShape, out_sample: [learnsVariance ? 2 * channels : channels, ...size] };
  for (const { name, shape } of [...(session.inputMetadata ?? []), ...(session.outputMetadata ?? [])]) {
    if (name in shapes && shape && shape.slice(1).join() !== shapes[name].join()) {
      throw new BundleError(
        `the bundle's network must have the shape [${shapes[name]}] for each ${name}, but has [${shape.slice(1)}]`,
      );
    }
  }
}

/**
 * Open a bundle.
 * @param {object} ort onnxruntime-web or onnxruntime-node
 * @param {(name: string) => Promise<Uint8Array>} read reads one of the bundle's files
 * @param {object} options options of onnxruntime's session
 * @returns {Promise<Sampler>}
 * @throws {BundleError} if a file can't be read or doesn't fit the others
 */
export async function openBundle(ort, read, options = {}) {
  const info = parseInfo(await read("bundle.json"));
  const readChecked = async (name) => {
    const bytes = await read(name);
    await checkSum(name, bytes, info.sha256?.[name]);
    return bytes;
  };
  const table = parseTable(await readChecked("step_table.json"));
  const network = await readChecked("unet.onnx");
  let session;
  try {
    session = await ort.InferenceSession.create(network, { logSeverityLevel: 4, ...options });
  } catch (error) {
    const message = oneLine(error);
    const what = /backend/i.test(message) ? "ONNX Runtime can't start" : "unet.onnx can't be loaded";
    throw new BundleError(`${what}: ${message}`);
  }
  checkNetwork(session, info, table.steps[0].logVariance !== undefined);
  if (table.steps.some(({ guidanceScale }) => guidanceScale !== 1)) resolve(info, table, 1);
  return new Sampler(ort, session, table, info);
}

/** Return an error's message in one line. */
export function oneLine(error) {
  return String(error?.message ?? error).replace(/\s+/g, " ").trim();
}

/** Sampler of points or images. Use `openBundle` to create one. */
export class Sampler {
  constructor(ort, session, table, info) {
    Object.assign(this, { ort, session, table, info });
    /** @type {number[]} `[dimension]` for points, `[channels, height, width]` for images */
    this.sampleShape = info.sample_shape;
    this.isPoints = this.sampleShape.length === 1;
    this.dimension = sizeOf(this.sampleShape);
    /** @type {string[]} names of the classes that the network knows */
    this.classNames = info.class_names;
    /** The coding of a table's columns, or null if the samples are no table's rows. */
    this.codec = codecOf(info);
    /** @type {string[]} names of the condition's numbers */
    this.conditionColumns = info.condition_columns;
    /** Whether samples can be guided: the network has learned what no label and no condition is. */
    this.isGuidable =
      info.inputs.length > INPUTS.length && !(this.classNames.length && info.null_label === null) &&
      (this.classNames.length > 0 || !info.condition_is_known);
    /** Whether the table takes known values. */
    this.takesKnown = table.steps[0].alphaCumprod !== undefined;
  }

  /**
   * Evaluate the network for x_t.
   * @param {Float32Array} x x_t, `[numSamples, ...sampleShape]`
   * @param {number} timestep
   * @param {object} inputs its further inputs, with a row for each sample: `class_labels` a BigInt64Array of numbers,
   *   `condition` a Float32Array, normalised, NaN for none
   * @returns {Promise<Float32Array>} its output, of twice the channels where it predicts the variance
   */
  async predict(x, timestep, inputs = {}) {
    const { Tensor } = this.ort, number = x.length / this.dimension;
    const feeds = {
      sample: new Tensor("float32", x, [number, ...this.sampleShape]),
      timestep: new Tensor("float32", Float32Array.of(timestep), []),
    };
    const { class_labels: labels, condition } = inputs;
    if (labels) feeds.class_labels = new Tensor("int64", labels, [number]);
    if (condition) feeds.condition = new Tensor("float32", condition, [number, condition.length / number]);
    const output = (await this.session.run(feeds)).out_sample.data;
    if (!output.every(Number.isFinite)) {
      throw new BundleError(
        `unet.onnx returns non-finite numbers at t = ${timestep}: its weights are damaged`,
      );
    }
    return output;
  }

  /**
   * Sample one batch, and yield each denoising step.
   * @param {number} numSamples
   * @param {bigint} seed in [0, 2⁶³)
   * @param {number} first index of the batch's first sample among those of the seed
   * @param {Asked} asked what to draw
   * @returns {AsyncGenerator<DenoisingStep>}
   * @throws {RangeError} if what is asked doesn't fit the network, with one line
   */
  async *steps(numSamples, seed, first = 0, asked = {}) {
    yield* this.#steps(resolve(this.info, this.table, numSamples, asked), numSamples, seed, first, 0);
  }

  /** Do `steps` of a resolved request. The batch's first sample has the request's row `row`. */
  async *#steps({ table, inputs: all, nulls, y: knowns, m: masks, classShares }, numSamples, seed, first, row) {
    const { initialScale, clipRange, steps } = table, { dimension } = this;
    const draw = (k, stream) => normal(seed, first, numSamples, dimension, k, stream);
    const [inputs, none] = [all, nulls].map((rows) => {
      const sizes = { class_labels: 1, condition: conditionSize(this.info) };
      return Object.fromEntries(Object.keys(rows).map((n) => [n, rowsOf(rows[n], sizes[n], row, numSamples)]));
    });
    if (classShares) inputs.class_labels = drawLabels(seed, first, numSamples, classShares);
    const [y, m] = [knowns, masks].map((rows) => rows && rowsOf(rows, dimension, row, numSamples));
    const both = Object.fromEntries(Object.keys(none).map((n) => [n, concatenated(inputs[n], none[n])]));
    // ε, and v where the network predicts the variance, of a call; guided, with both halves in one batch.
    const predict = async (x, { timestep, guidanceScale: w, logVariance }) => {
      const split = (output) => (logVariance ? halves(output, dimension) : [output]);
      if (w === 1) return split(await this.predict(x, timestep, inputs));
      const output = await this.predict(concatenated(x, x), timestep, both), half = output.length / 2;
      const [[conditional, v], [unconditional]] = [output.subarray(0, half), output.subarray(half)].map(split);
      return [combine([w, 1 - w], [conditional, unconditional]), v];
    };

    let x = draw(0).map((value) => value * initialScale);
    const history = []; // [x, ε, x̂_0, z] of the last steps, the newest first
    const memory = Math.max(...steps.map(({ toNext }) => toNext.length));
    for (const [index, step] of steps.entries()) {
      const { timestep, toX0, toNext, isStochastic, logVariance } = step;
      const [eps, v] = await predict(x, step);
      const x0 = clipRange === null ? undefined : combine(toX0, [x, eps]).map((u) => clamp(u, -clipRange, clipRange));
      let z = isStochastic ? draw(index + 1) : undefined;
      if (z && logVariance) z = z.map((u, i) => u * Math.exp((logVariance[0] * v[i] + logVariance[1]) / 2));
      history.unshift([x, eps, x0, z]);
      history.length = Math.min(history.length, memory);
      const sample = combine(toNext.flat(), history.flat());
      let zKnown;
      if (y) {
        const next = steps[index + 1]?.alphaCumprod ?? 1; // ᾱ of what the network sees next
        if (index + 1 < steps.length) zKnown = draw(index, 1);
        const noisy = zKnown ? combine([Math.sqrt(next), Math.sqrt(1 - next)], [y, zKnown]) : y;
        m.forEach((isKnown, i) => { if (isKnown) sample[i] = noisy[i]; });
      }
      yield { index, timestep, x, eps, x0, z, zKnown, sample };
      x = sample;
    }
  }

  /**
   * Draw samples in batches, in the data's units.
   * @param {number} numSamples
   * @param {bigint} seed in [0, 2⁶³)
   * @param {number} batchSize limits memory use; samples don't depend on it
   * @param {Asked} asked what to draw
   * @returns {AsyncGenerator<Float32Array>}
   * @throws {RangeError} if what is asked doesn't fit the network, with one line
   */
  async *batches(numSamples, seed, batchSize = 512, asked = {}) {
    const request = resolve(this.info, this.table, numSamples, asked);
    for (let first = 0; first < numSamples; first += batchSize) {
      const number = Math.min(batchSize, numSamples - first);
      let sample;
      for await (const step of this.#steps(request, number, seed, first, first)) sample = step.sample;
      yield this.toDataUnits(sample);
    }
  }

  /**
   * Convert samples in the network's units, `[numSamples, ...sampleShape]`, to points in the data's units or to
   * images in [0, 1], `[numSamples, height, width, channels]`.
   * @param {Float32Array} sample
   * @returns {Float32Array}
   */
  toDataUnits(sample) {
    if (this.isPoints) {
      const { data_mean: mean, data_std: std } = this.info;
      return sample.map((value, i) => value * std[i % std.length] + mean[i % mean.length]);
    }
    const [channels, height, width] = this.sampleShape;
    const size = height * width, images = new Float32Array(sample.length);
    for (let i = 0; i < sample.length; i++) {
      const image = Math.floor(i / this.dimension), channel = Math.floor(i / size) % channels;
      images[image * this.dimension + (i % size) * channels + channel] = clamp(sample[i] / 2 + 0.5, 0, 1);
    }
    return images;
  }
}

// Column names that need no quotes in CSV. Names that look like numbers do.
const PLAIN_NAME = /^(?!(?:nan|inf|infinity)$)[A-Z_][^",\r\n]*$/i;

/**
 * Return points as the text of a CSV file, with nine significant digits, which identify every float32.
 * @param {Float32Array} points `[numPoints, columns.length]`
 * @param {string[]} columns
 */
export function toCsv(points, columns) {
  const rows = [columns.map((name) => (PLAIN_NAME.test(name) ? name : `"${name.replaceAll('"', '""')}"`)).join()];
  for (let i = 0; i < points.length; i += columns.length) {
    rows.push(Array.from(points.subarray(i, i + columns.length), (value) => Number(value.toPrecision(9))).join());
  }
  return `${rows.join("\n")}\n`;
}

const sizeOf = (shape) => shape.reduce((a, b) => a * b, 1);

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Split the output of twice the channels into the first and the second half of each sample's channels. */
function halves(output, dimension) {
  return [0, dimension].map((start) => {
    const half = new Float32Array(output.length / 2);
    for (let i = 0; i < half.length; i += dimension) {
      half.set(output.subarray(2 * i + start, 2 * i + start + dimension), i);
    }
    return half;
  });
}

/** Return the float32 sum of arrays times their coefficients. Arrays with the coefficient 0 may be undefined. */
function combine(coefficients, arrays) {
  const sum = new Float64Array(arrays[0].length);
  coefficients.forEach((coefficient, j) => {
    if (coefficient === 0) return;
    const array = arrays[j];
    for (let i = 0; i < sum.length; i++) sum[i] += coefficient * array[i];
  });
  return Float32Array.from(sum);
}
