/** The page's inputs and outputs. Sampling runs in worker.js. */

import { TableCodec } from "./columns.js";
import { MAX_SEED, parseCount, parseNumber, parseSeed, toCsv } from "./ddpm.js";
import { axesOf, countOutside, drawImages, drawPoints, paintAt } from "./draw.js";
import { create, MAX_ROWS, RowsTable } from "./table.js";

const MAX_POINTS = 10_000;
const MAX_NUMBERS = 2 ** 18; // in all samples together: 334 MNIST digits or 85 CIFAR images
const MAX_KEPT = 2 ** 24; // numbers kept for the slider over the steps, 64 MB
const MAX_BUTTONS = 12; // more classes are a select
const MAX_OPTIONS = 1000; // of a category that is offered to choose from
const WORTH = 1000; // milliseconds: for a faster draw, no other backend is tried
const RESAMPLE = 5; // times that each step is taken where a part is drawn anew, so that it fits the rest
const element = (id) => document.getElementById(id);
const [form, seedInput, countInput, drawButton, stepInput, saveButton, progress, status, canvas] = [
  "form", "seed", "count", "draw", "step", "save", "progress", "status", "canvas",
].map(element);
const showError = window.showError; // defined in index.html, which also reports that this file can't be loaded
const format = (number, digits = 0) =>
  number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const plural = (number, noun) => `${format(number)} ${noun}${number === 1 ? "" : "s"}`;

/** What can run the network. Threads need shared memory, which browsers allow only to pages with two headers. */
const numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
const BACKENDS = {
  wasm: { label: "one thread", provider: "wasm", numThreads: 1 },
  threads: { label: `${numThreads} threads`, provider: "wasm", numThreads },
  webgpu: { label: "WebGPU", provider: "webgpu", numThreads: 1 },
};

/** Return whether WebGPU has a device that is not of software, which would take seconds for a step. */
async function hasGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

/** Start a worker, and return it with `ask`, which calls one of its `answers` and returns the result. */
function startWorker() {
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  const waiting = new Map();
  let lastId = 0;
  worker.onmessage = ({ data: { id, result, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    event.preventDefault();
    const error = new Error(`worker.js can't be run${event.message ? `: ${event.message}` : ""}`);
    for (const { reject } of waiting.values()) reject(error);
  };
  const ask = (name, argument) => new Promise((resolve, reject) => {
    const id = ++lastId;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, name, argument });
  });
  return { ask, end: () => worker.terminate() };
}

let backend; // the worker that draws, with the name of its backend
let model; // the answer to `open`, with properties derived from it
/** @type {{label: string, samples: Float32Array}[]} the steps that the slider can show */
let frames = [];
let drawing = null; // the current run, { stopped: boolean }
let finished = null; // the last run that was not stopped, { seed, asked, anew }: its images can be painted
/** @type {Uint8Array | null} `[images, height, width]`, 1 where they are painted over */
let paint = null;
const paintButtons = ["upper", "lower", "clear"].map(element), redrawButton = element("redraw");

/** Return in words what the samples are. */
function kindOf({ sample_shape: [channels, height, width], data_columns: coordinates, columns }) {
  if (columns) return `Table of ${plural(columns.length, "column")}`;
  if (height === undefined) return `Points (${coordinates.join(", ")})`;
  return `${channels === 1 ? "Grey" : "Colour"} images of ${width} × ${height} pixels`;
}

function describe({ info, scheduler, numCalls }) {
  const { provenance = {} } = info;
  const { checkpoint, unet, num_parameters: parameters, precision, exported_at: exported, versions = {} } = provenance;
  element("title").textContent = document.title = checkpoint ?? "Samples of a small DDPM";
  const parts = [
    kindOf(info),
    unet && `${unet}${Number.isInteger(parameters) ? ` with ${format(parameters)} parameters` : ""}`,
    precision && precision !== "fp32" && precision,
    `${scheduler.replace(/Scheduler$/, "")} with ${plural(numCalls, "network evaluation")}`,
  ];
  element("model").textContent = parts.filter(Boolean).join(" · ");
  const version = versions["ddpm-mlp-pipeline"];
  element("provenance").textContent = exported
    ? `Exported on ${String(exported).slice(0, 10)}${version ? ` with ddpm-mlp-pipeline ${version}` : ""}.`
    : "";
}

/**
 * Start a worker on each backend that is there, and keep the fastest.
 * @returns {Promise<string>} the times of a step
 */
async function chooseBackend() {
  const time = () => backend.ask("time", {
    numSamples: parseCount(countInput.value, model.maxCount), // a browser may have kept what was typed before
    asked: readAsked(),
  });
  const times = new Map();
  status.textContent = "Timing a step …";
  try {
    times.set(backend.name, await time());
  } catch { // a draw says what is wrong
    return "";
  }
  const isThere = { threads: numThreads > 1, webgpu: await hasGpu() };
  const others = Object.keys(BACKENDS).filter((name) => isThere[name]);
  if (times.get(backend.name) * model.numCalls < WORTH) others.length = 0;
  for (const name of others) {
    status.textContent = `Trying ${BACKENDS[name].label} …`;
    const before = backend;
    try {
      backend = await openOn(name);
      times.set(name, await time());
    } catch {} // such as too little memory: it has no time
    const [slower, faster] = times.get(name) < times.get(before.name) ? [before, backend] : [backend, before];
    if (slower !== faster) slower.end();
    backend = faster;
  }
  const shown = [...times].sort(([, a], [, b]) => a - b);
  return shown.map(([name, ms]) => `${BACKENDS[name].label}: ${format(ms, 1)} ms a step`).join("; ");
}

/** Start a worker that opens the bundle on a backend. */
async function openOn(name) {
  const worker = startWorker();
  try {
    return { ...worker, name, opened: await worker.ask("open", BACKENDS[name]) };
  } catch (error) {
    worker.end();
    throw error;
  }
}

async function open() {
  const wanted = new URLSearchParams(location.search).get("backend");
  if (wanted !== null && !Object.hasOwn(BACKENDS, wanted)) {
    throw new Error(`?backend= must be one of ${Object.keys(BACKENDS).join(", ")}.`);
  }
  if (wanted === "threads" && numThreads === 1) throw new Error("Threads need two headers, which this server doesn't send.");
  backend = await openOn(wanted ?? "wasm");
  const { opened } = backend;
  const { info, clipRange } = opened;
  const shape = info.sample_shape, dimension = shape.reduce((a, b) => a * b);
  const codec = info.columns ? new TableCodec(info.columns) : null;
  const isPoints = shape.length === 1 && !codec, isImages = shape.length > 1;
  if (isImages && shape[0] !== 1 && shape[0] !== 3) {
    throw new Error(`The page can show images with 1 or 3 channels, but these have ${shape[0]}.`);
  }
  describe(opened);
  model = {
    ...opened,
    dimension,
    codec,
    isPoints,
    isImages,
    noun: codec ? "row" : isPoints ? "point" : "image",
    rows: codec && new RowsTable(document.querySelector("#rows table"), element("summary"), codec),
    maxCount: Math.max(1, Math.min(MAX_POINTS, Math.floor(MAX_NUMBERS / dimension))),
    axes: isPoints ? axesOf(info, clipRange) : null,
  };
  countInput.value ||= String(Math.min(model.maxCount, codec ? MAX_ROWS : isPoints ? 2000 : 16));
  element("hint").textContent = `At most ${plural(model.maxCount, model.noun)}. The same seed gives the same samples everywhere.`;
  saveButton.textContent = codec ? "Download CSV" : isPoints ? "Save as CSV" : "Save as PNG";
  canvas.className = isPoints ? "points" : "images";
  canvas.hidden = Boolean(codec);
  element("rows").hidden = element("summary").hidden = !codec;
  document.querySelector("main").classList.toggle("table", Boolean(codec));
  canvas.dataset.axes = JSON.stringify(model.axes);
  show(0);
  offerChoices(opened);
  status.textContent = wanted ? BACKENDS[wanted].label : await chooseBackend();
  status.dataset.backend = backend.name;
  drawButton.disabled = false;
}

/** Show the controls that this bundle supports: class, condition, guidance, painting. */
function offerChoices({ info, guidanceScale, isGuidable, takesKnown }) {
  const { class_names: names = [], null_label: nullLabel = null, class_shares: shares, condition_columns: columns = [] } =
    info;
  const choices = names.map((name, i) => [name, i]).filter(([, i]) => i !== nullLabel);
  if (nullLabel !== null || shares) choices.unshift(["any", ""]); // which asks for no label
  if (names.length > MAX_BUTTONS) {
    element("label").append(...choices.map(([name, value]) => create("option", { value, textContent: name })));
    element("label-field").hidden = false;
  } else if (names.length) {
    element("labels").append(...choices.map(([name, value], i) => create(
      "label", { className: "choice" },
      create("input", { type: "radio", name: "label", value, checked: i === 0 }), create("span", { textContent: name }),
    )));
    element("labels").hidden = false;
  }
  element("conditions").append(...columns.map((name, i) => create(
    "div", {},
    create("label", { htmlFor: `condition-${i}`, textContent: name }),
    create("input", {
      type: "text", id: `condition-${i}`, autocomplete: "off", placeholder: "any",
      value: String(Number(info.condition_mean[i].toPrecision(4))),
    }),
  )));
  element("conditions").hidden = columns.length === 0;
  const slider = element("guidance"), showScale = () => { element("guidance-value").textContent = slider.value; };
  slider.min = Math.min(0, guidanceScale);
  slider.max = Math.max(4, guidanceScale);
  slider.value = guidanceScale;
  model.initialScale = slider.value; // rounded
  slider.addEventListener("input", showScale);
  showScale();
  element("guidance-field").hidden = !isGuidable;
  element("paint").hidden = !model.isImages || !takesKnown;
  if (model.codec && info.condition_is_known && takesKnown) offerCells(model.codec);
}

/** Show a field for each column of a table, whose cells can be known. */
function offerCells({ columns }) {
  element("cells").append(...columns.map(({ name, texts, range }, i) => {
    const id = `cell-${i}`, options = texts?.length <= MAX_OPTIONS ? texts : [];
    const listed = create("datalist", { id: `${id}-values` }, ...options.map((value) => create("option", { value })));
    const input = create("input", { type: "text", id, autocomplete: "off", placeholder: range ?? "any" });
    input.setAttribute("list", listed.id);
    return create("div", {}, create("label", { htmlFor: id, textContent: name }), input, listed);
  }));
  element("known").hidden = false;
}

/** Read the known cells, as coordinates, NaN for the others; undefined if there are none. */
function readCells(codec) {
  const known = Array(codec.width).fill(NaN);
  codec.names.forEach((name, i) => {
    const encode = (text) => codec.encode({ [name]: text });
    read(element(`cell-${i}`), encode).forEach((value, j) => { if (!Number.isNaN(value)) known[j] = value; });
  });
  return known.every(Number.isNaN) ? undefined : known;
}

/** Read the class, the condition and the guidance. */
function readAsked() {
  const { class_names: names = [], condition_columns: columns = [] } = model.info;
  const asked = {}, slider = element("guidance");
  const label = names.length > MAX_BUTTONS ? element("label").value : form.elements.label?.value;
  if (label) asked.classLabels = Number(label);
  const inputs = columns.map((_, i) => element(`condition-${i}`));
  inputs.forEach((input) => input.removeAttribute("aria-invalid"));
  if (inputs.some((input) => input.value.trim())) { // none at all: any
    asked.condition = inputs.map((input, i) => read(input, parseNumber, columns[i]));
  }
  if (!element("known").hidden) asked.known = readCells(model.codec);
  // Until it is moved, the bundle's own steps decide, which may be guided at some timesteps only.
  if (model.isGuidable && slider.value !== model.initialScale) asked.guidanceScale = Number(slider.value);
  return asked;
}

/** Draw one of the frames, or, if there are none, what there is without. */
function show(index) {
  const samples = frames[index]?.samples ?? null;
  if (model.codec) model.rows.show(samples);
  else if (model.isPoints) drawPoints(canvas, samples, model.dimension, model.axes);
  else if (samples) drawImages(canvas, samples, model.info.sample_shape, index === frames.length - 1 ? paint : null);
  if (samples) {
    const what = plural(samples.length / model.dimension, model.noun);
    canvas.setAttribute("aria-label", `${what}, ${frames[index].label}`);
  }
}

/** Parse an input, and mark it if it is not valid. */
function read(input, parse, ...more) {
  try {
    const value = parse(input.value, ...more);
    input.removeAttribute("aria-invalid");
    return value;
  } catch (error) {
    input.setAttribute("aria-invalid", "true");
    const details = input.closest("details");
    if (details) details.open = true; // what is hidden can't have the focus
    input.focus();
    throw error;
  }
}

/** Show the last frame, and set the slider to it. */
function showLast() {
  stepInput.max = Math.max(0, frames.length - 1); // set before the value, which it limits
  stepInput.value = stepInput.max;
  show(frames.length - 1);
}

/** Start painting with an empty mask, or end it. */
function setPaint(isOn) {
  const [, height, width] = model.info.sample_shape;
  const canPaint = isOn && !element("paint").hidden;
  paint = canPaint ? new Uint8Array((frames.at(-1).samples.length / model.dimension) * height * width) : null;
  canvas.classList.toggle("paintable", canPaint);
  for (const button of paintButtons) button.disabled = !canPaint;
  redrawButton.disabled = true;
}

/** Show the last frame with the paint as it is now. */
function showPaint() {
  redrawButton.disabled = !paint.includes(1);
  showLast();
}

/**
 * Draw samples step by step, and show them.
 * @param {{seed: bigint, count: number, asked: object, numCalls: number}} what
 * @param {(samples: Float32Array) => Float32Array} whole turns the run's samples into all that are shown
 * @returns {Promise<string>} how long it took
 */
async function draw({ seed, count, asked, numCalls }, whole) {
  const run = drawing;
  progress.max = numCalls;
  frames = [];
  let stride, seconds = 0, shown = performance.now();
  // Slow down fast steps to make them visible, by two seconds in all at most.
  const pause = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : Math.min(150, 2000 / numCalls);
  await backend.ask("start", { numSamples: count, seed, asked });
  for (let k = 0; k < numCalls && !(run.stopped && frames.length); k++) {
    const { timestep, milliseconds, initial, sample } = await backend.ask("step");
    seconds += milliseconds / 1000;
    if (initial) {
      frames.push({ label: `noise, before the first of ${plural(numCalls, "step")}`, samples: whole(initial) });
    }
    const label = `step ${k + 1} of ${numCalls}, t = ${Number(timestep.toPrecision(6))}`;
    const frame = { label, samples: whole(sample) };
    stride ??= Math.ceil((numCalls * frame.samples.length) / MAX_KEPT);
    if (k % stride === 0 || k === numCalls - 1) frames.push(frame);
    progress.value = k + 1;
    status.textContent = `${frame.label}, ${format(seconds, 2)} s`;
    const wait = shown + pause - performance.now();
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
    if (pause > 0 && performance.now() - shown > 15) {
      show(frames.length - 1);
      shown = performance.now();
      await new Promise((resolve) => setTimeout(resolve)); // let the browser paint
    }
  }
  return `${format(seconds, 2)} s, ${format((1000 * seconds) / numCalls, 1)} ms a step on ${BACKENDS[backend.name].label}`;
}

/** Draw what the form says. */
async function drawAll() {
  const seed = read(seedInput, parseSeed), count = read(countInput, parseCount, model.maxCount);
  const asked = readAsked();
  begin();
  const took = await draw({ seed, count, asked, numCalls: model.numCalls }, (samples) => samples);
  const outside = model.isPoints ? countOutside(frames.at(-1).samples, model.dimension, model.axes) : 0;
  finish({ seed, asked, anew: 0 },
    `${plural(count, model.noun)} in ${took}${outside ? `; ${format(outside)} outside the axes` : ""}`);
}

/** Draw the painted parts of images anew, with another seed's noise. */
async function drawAnew() {
  const [, height, width] = model.info.sample_shape, size = height * width, { dimension } = model;
  const { seed, asked } = finished, anew = finished.anew + 1, before = frames.at(-1).samples;
  const images = Array.from({ length: before.length / dimension }, (_, i) => i)
    .filter((i) => paint.subarray(i * size, (i + 1) * size).includes(1));
  const known = images.flatMap((i) => Array.from(before.subarray(i * dimension, (i + 1) * dimension)));
  const mask = images.flatMap((i) => Array.from(paint.subarray(i * size, (i + 1) * size), (painted) => !painted));
  const resample = model.isResampleable ? RESAMPLE : 1;
  begin();
  const took = await draw({
    seed: (seed + BigInt(anew)) % (MAX_SEED + 1n),
    count: images.length,
    asked: { ...asked, known, mask, resample },
    numCalls: model.numCalls * resample,
  }, (samples) => {
    const all = before.slice();
    images.forEach((i, j) => all.set(samples.subarray(j * dimension, (j + 1) * dimension), i * dimension));
    return all;
  });
  finish({ seed, asked, anew }, `${plural(images.length, model.noun)} drawn anew where painted, in ${took}`);
}

/** Prepare the page for a run. */
function begin() {
  drawButton.textContent = "Stop";
  saveButton.disabled = stepInput.disabled = true;
  status.dataset.state = "drawing";
  finished = null;
  setPaint(false);
}

/** Show the result of a run. */
function finish(what, summary) {
  const { stopped } = drawing;
  if (!stopped) {
    finished = what;
    setPaint(true);
  }
  showLast();
  status.textContent = stopped ? `Stopped: ${frames.at(-1).label}` : summary;
  saveButton.disabled = stopped;
  const anew = what.anew ? `-anew-${what.anew}` : "";
  saveButton.dataset.name = `${model.info.provenance?.checkpoint ?? "samples"}-seed-${what.seed}${anew}`;
}

/** Start a run, unless there is one, and show its errors. */
async function attempt(draws) {
  if (drawing) return;
  drawing = { stopped: false };
  showError("");
  try {
    await draws();
    status.dataset.state = drawing.stopped ? "stopped" : "done";
  } catch (error) {
    status.dataset.state = "failed";
    status.textContent = "";
    progress.value = 0;
    if (frames.length) showLast();
    showError(error.message);
  }
  drawing = null;
  drawButton.textContent = "Draw";
  stepInput.disabled = frames.length === 0;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (drawing) drawing.stopped = true;
  else attempt(drawAll);
});

redrawButton.addEventListener("click", () => attempt(drawAnew));

for (const [name, isPainted] of [
  ["upper", (row, height) => row < height / 2],
  ["lower", (row, height) => row >= height / 2],
  ["clear", () => false],
]) {
  element(name).addEventListener("click", () => {
    const [, height, width] = model.info.sample_shape;
    paint.forEach((_, i) => { paint[i] = Number(isPainted(Math.floor(i / width) % height, height)); });
    showPaint();
  });
}

let brush = null; // where the pointer was last, in the canvas's pixels, while it paints

function moveBrush(event) {
  const box = canvas.getBoundingClientRect();
  const place = [
    ((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height,
  ];
  const from = brush ?? place, steps = Math.ceil(Math.hypot(place[0] - from[0], place[1] - from[1])) || 1;
  for (let i = 1; i <= steps; i++) {
    paintAt(paint, canvas, [0, 1].map((c) => from[c] + ((place[c] - from[c]) * i) / steps), model.info.sample_shape);
  }
  brush = place;
  showPaint();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!paint || !event.isPrimary) return;
  canvas.setPointerCapture(event.pointerId);
  moveBrush(event);
});
canvas.addEventListener("pointermove", (event) => { if (paint && brush) moveBrush(event); });
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { brush = null; });

stepInput.addEventListener("input", () => {
  const index = Number(stepInput.value);
  show(index);
  status.textContent = frames[index].label;
});

saveButton.addEventListener("click", async () => {
  const { samples } = frames.at(-1);
  let blob;
  if (model.codec) {
    blob = new Blob([model.codec.toCsv(samples)], { type: "text/csv" });
  } else if (model.isPoints) {
    blob = new Blob([toCsv(samples, model.info.data_columns)], { type: "text/csv" });
  } else {
    const grid = document.createElement("canvas"); // the page's canvas may show another step
    drawImages(grid, samples, model.info.sample_shape);
    blob = await new Promise((resolve) => grid.toBlob(resolve));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${saveButton.dataset.name}.${model.isImages ? "png" : "csv"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});

const redraw = () => { if (model && (model.isPoints || frames.length)) show(Number(stepInput.value)); };
window.addEventListener("resize", () => { if (!drawing) redraw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

try {
  await open();
} catch (error) {
  element("model").textContent = "";
  showError(error.message);
}
