/**
 * Sample from a bundle as export/FORMAT.md describes, in a browser with onnxruntime-web or in Node with
 * onnxruntime-node.
 */

export const MAX_SEED = 2n ** 63n - 1n;
const FORMATS = { "bundle.json": ["ddpm-bundle", 1], "step_table.json": ["ddpm-step-table", 2] };

/** A bundle's file is missing, not readable or doesn't fit the other files. The message is one line. */
export class BundleError extends Error {}

/**
 * @typedef {object} DenoisingStep One network evaluation; arrays are float32 `[numSamples, ...sampleShape]`.
 * @property {number} index number of the step, from 0
 * @property {number} timestep timestep given to the network
 * @property {Float32Array} x the network's input
 * @property {Float32Array} eps its output
 * @property {Float32Array | undefined} x0 the clipped prediction of x_0, if the table clips
 * @property {Float32Array | undefined} z the noise drawn, if the table uses any
 * @property {Float32Array} sample the network's next input; after the last step, the sample in the network's units
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
 * @param {number} draw 0 is the initial noise, k + 1 the noise of step k
 * @returns {Float32Array} `[numSamples, dimension]`
 */
export function normal(seed, first, numSamples, dimension, draw) {
  const k0 = Number(seed & 0xffffffffn), k1 = Number(seed >> 32n);
  const start = draw * dimension, firstBlock = Math.floor(start / 4), lastBlock = Math.ceil((start + dimension) / 4);
  const words = new Uint32Array(4), stream = new Float32Array(4 * (lastBlock - firstBlock));
  const normals = new Float32Array(numSamples * dimension);
  for (let i = 0; i < numSamples; i++) {
    for (let block = firstBlock; block < lastBlock; block++) {
      philox(words, k0, k1, block, first + i);
      boxMuller(words[0], words[1], stream, 4 * (block - firstBlock));
      boxMuller(words[2], words[3], stream, 4 * (block - firstBlock) + 2);
    }
    const offset = start - 4 * firstBlock;
    normals.set(stream.subarray(offset, offset + dimension), i * dimension);
  }
  return normals;
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

const quote = (text) => JSON.stringify(text.length > 40 ? `${text.slice(0, 40)}…` : text);

// The bundle's files

function parseJson(name, bytes) {
  let content;
  try {
    content = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new BundleError(`${name} is not valid JSON: ${error.message}`);
  }
  const [format, version] = FORMATS[name];
  if (content?.format !== format || content.version !== version) {
    throw new BundleError(`${name} is not of the format ${format}, version ${version}`);
  }
  return content;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const areNumbers = (value, length) => Array.isArray(value) && value.length === length && value.every(isNumber);

/** @throws {BundleError} */
export function parseInfo(bytes) {
  const fail = (message) => { throw new BundleError(`bundle.json: ${message}`); };
  const info = parseJson("bundle.json", bytes);
  if (info.inputs !== undefined && String(info.inputs) !== "sample,timestep") {
    fail(`the network has the inputs ${info.inputs}, but this version supports only sample and timestep`);
  }
  const shape = info.sample_shape;
  const isShape = Array.isArray(shape) && [1, 3].includes(shape.length);
  if (!isShape || !shape.every((size) => Number.isInteger(size) && size > 0)) {
    fail("sample_shape must be [dimension] or [channels, height, width]");
  }
  const { sha256 = {} } = info;
  if (typeof sha256 !== "object" || sha256 === null || Array.isArray(sha256)) {
    fail("sha256 must be an object of file names and checksums");
  }
  if (shape.length === 1) {
    for (const name of ["data_mean", "data_std"]) {
      if (!areNumbers(info[name], shape[0])) fail(`${name} must hold ${shape[0]} finite numbers`);
    }
    const columns = info.data_columns;
    if (!Array.isArray(columns) || columns.length !== shape[0] || !columns.every((name) => typeof name === "string")) {
      fail(`data_columns must hold ${shape[0]} names`);
    }
  }
  return info;
}

/**
 * @returns {{scheduler: string, initialScale: number, clipRange: number | null, steps: {timestep: number,
 *   toX0: number[], toNext: number[][], isStochastic: boolean}[]}}
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
    return { timestep: step.timestep, toX0: step.to_x_0, toNext: toNext.slice(0, k + 1), isStochastic: false };
  });
  // A step draws noise if it or a later step uses that noise.
  rows.forEach(({ toNext }, k) => toNext.forEach((row, i) => { rows[k - i].isStochastic ||= row[3] !== 0; }));
  return { scheduler: String(content.scheduler), initialScale, clipRange, steps: rows };
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

function checkNetwork(session, sampleShape) {
  const names = [...session.inputNames, ...session.outputNames];
  const inputs = [...session.inputNames].sort().join();
  if (inputs !== "sample,timestep" || session.outputNames.join() !== "out_sample") {
    throw new BundleError(
      `unet.onnx must have the inputs sample and timestep and the output out_sample, but has ${names.join(", ")}`,
    );
  }
  for (const { name, shape } of [...(session.inputMetadata ?? []), ...(session.outputMetadata ?? [])]) {
    if (name !== "timestep" && shape && shape.slice(1).join() !== sampleShape.join()) {
      throw new BundleError(
        `bundle.json has the sample shape [${sampleShape}], but the network's ${name} has [${shape.slice(1)}]`,
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
  checkNetwork(session, info.sample_shape);
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
    this.dimension = this.sampleShape.reduce((a, b) => a * b);
  }

  /** Evaluate the network for x_t, float32 `[numSamples, ...sampleShape]`, in the network's units. */
  async predict(x, timestep) {
    const { Tensor } = this.ort;
    const feeds = {
      sample: new Tensor("float32", x, [x.length / this.dimension, ...this.sampleShape]),
      timestep: new Tensor("float32", Float32Array.of(timestep), []),
    };
    return (await this.session.run(feeds)).out_sample.data;
  }

  /**
   * Sample one batch, and yield each denoising step.
   * @param {number} numSamples
   * @param {bigint} seed in [0, 2⁶³)
   * @param {number} first index of the batch's first sample
   * @returns {AsyncGenerator<DenoisingStep>}
   */
  async *steps(numSamples, seed, first = 0) {
    const { initialScale, clipRange, steps } = this.table;
    const draw = (k) => normal(seed, first, numSamples, this.dimension, k);
    let x = draw(0).map((value) => value * initialScale);
    const history = []; // [x, ε, x̂_0, z] of the last steps, the newest first
    const memory = Math.max(...steps.map(({ toNext }) => toNext.length));
    for (const [index, { timestep, toX0, toNext, isStochastic }] of steps.entries()) {
      const eps = await this.predict(x, timestep);
      if (!eps.every(Number.isFinite)) {
        throw new BundleError(`unet.onnx returns non-finite numbers at t = ${timestep}: export another checkpoint`);
      }
      const x0 = clipRange === null ? undefined : combine(toX0, [x, eps]).map((v) => clamp(v, -clipRange, clipRange));
      const z = isStochastic ? draw(index + 1) : undefined;
      history.unshift([x, eps, x0, z]);
      history.length = Math.min(history.length, memory);
      const sample = combine(toNext.flat(), history.flat());
      yield { index, timestep, x, eps, x0, z, sample };
      x = sample;
    }
  }

  /**
   * Draw samples in batches, in the data's units.
   * @param {number} numSamples
   * @param {bigint} seed in [0, 2⁶³)
   * @param {number} batchSize limits memory use; samples don't depend on it
   * @returns {AsyncGenerator<Float32Array>}
   */
  async *batches(numSamples, seed, batchSize = 512) {
    for (let first = 0; first < numSamples; first += batchSize) {
      let sample;
      for await (const step of this.steps(Math.min(batchSize, numSamples - first), seed, first)) sample = step.sample;
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

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

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
