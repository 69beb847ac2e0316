/** The page's inputs and outputs. Sampling runs in worker.js. */

import { parseCount, parseSeed, toCsv } from "./ddpm.js";
import { axesOf, countOutside, drawImages, drawPoints } from "./draw.js";

const MAX_POINTS = 10_000;
const MAX_NUMBERS = 2 ** 18; // in all samples together: 334 MNIST digits or 85 CIFAR images
const MAX_KEPT = 2 ** 24; // numbers kept for the slider over the steps, 64 MB
const element = (id) => document.getElementById(id);
const [form, seedInput, countInput, drawButton, stepInput, saveButton, progress, status, canvas] = [
  "form", "seed", "count", "draw", "step", "save", "progress", "status", "canvas",
].map(element);
const showError = window.showError; // defined in index.html, which also reports that this file can't be loaded
const format = (number, digits = 0) =>
  number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const plural = (number, noun) => `${format(number)} ${noun}${number === 1 ? "" : "s"}`;

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

/** Have the worker call one of its `answers`, and return the result. */
function ask(name, argument) {
  return new Promise((resolve, reject) => {
    const id = ++lastId;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, name, argument });
  });
}

let model; // the answer to `open`, with properties derived from it
/** @type {{label: string, samples: Float32Array}[]} the steps that the slider can show */
let frames = [];
let drawing = null; // the current run, { stopped: boolean }

function describe({ info, scheduler, numCalls }) {
  const { sample_shape: shape, data_columns: columns, provenance = {} } = info;
  const { checkpoint, unet, num_parameters: parameters, precision, exported_at: exported, versions = {} } = provenance;
  element("title").textContent = document.title = checkpoint ?? "Samples of a small DDPM";
  const parts = [
    shape.length === 1
      ? `Points (${columns.join(", ")})`
      : `${shape[0] === 1 ? "Grey" : "Colour"} images of ${shape[2]} × ${shape[1]} pixels`,
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

async function open() {
  const opened = await ask("open");
  const { info, clipRange } = opened;
  const shape = info.sample_shape, dimension = shape.reduce((a, b) => a * b), isPoints = shape.length === 1;
  if (!isPoints && shape[0] !== 1 && shape[0] !== 3) {
    throw new Error(`The page can show images with 1 or 3 channels, but these have ${shape[0]}.`);
  }
  describe(opened);
  model = {
    ...opened,
    dimension,
    isPoints,
    noun: isPoints ? "point" : "image",
    maxCount: Math.max(1, Math.min(MAX_POINTS, Math.floor(MAX_NUMBERS / dimension))),
    axes: isPoints ? axesOf(info, clipRange) : null,
  };
  countInput.value ||= String(Math.min(model.maxCount, isPoints ? 2000 : 16));
  element("hint").textContent = `At most ${plural(model.maxCount, model.noun)}. The same seed gives the same samples everywhere.`;
  saveButton.textContent = isPoints ? "Save as CSV" : "Save as PNG";
  canvas.className = isPoints ? "points" : "images";
  canvas.dataset.axes = JSON.stringify(model.axes);
  show(0);
  drawButton.disabled = false;
}

/** Draw one of the frames; without frames, draw empty axes. */
function show(index) {
  const samples = frames[index]?.samples ?? null;
  if (model.isPoints) drawPoints(canvas, samples, model.dimension, model.axes);
  else if (samples) drawImages(canvas, samples, model.info.sample_shape);
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

async function draw() {
  const seed = read(seedInput, parseSeed), count = read(countInput, parseCount, model.maxCount);
  const { numCalls } = model;
  const run = (drawing = { stopped: false });
  drawButton.textContent = "Stop";
  saveButton.disabled = stepInput.disabled = true;
  status.dataset.state = "drawing";
  progress.max = numCalls;
  frames = [];
  const stride = Math.ceil((numCalls * count * model.dimension) / MAX_KEPT);
  // Slow down fast steps to make them visible, by two seconds in all at most.
  const pause = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : Math.min(150, 2000 / numCalls);
  let seconds = 0, shown = performance.now();
  await ask("start", { numSamples: count, seed });
  for (let k = 0; k < numCalls && !(run.stopped && frames.length); k++) {
    const { timestep, milliseconds, initial, sample } = await ask("step");
    seconds += milliseconds / 1000;
    if (initial) frames.push({ label: `noise, before the first of ${plural(numCalls, "step")}`, samples: initial });
    const frame = { label: `step ${k + 1} of ${numCalls}, t = ${Number(timestep.toPrecision(6))}`, samples: sample };
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
  showLast();
  const last = frames.at(-1).samples;
  const outside = model.isPoints ? countOutside(last, model.dimension, model.axes) : 0;
  status.textContent = run.stopped
    ? `Stopped: ${frames.at(-1).label}`
    : `${plural(count, model.noun)} in ${format(seconds, 2)} s, ${format((1000 * seconds) / numCalls, 1)} ms a step` +
      (outside ? `; ${format(outside)} outside the axes` : "");
  saveButton.disabled = run.stopped;
  saveButton.dataset.name = `${model.info.provenance?.checkpoint ?? "samples"}-seed-${seed}`;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (drawing) {
    drawing.stopped = true;
    return;
  }
  showError("");
  try {
    await draw();
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
});

stepInput.addEventListener("input", () => {
  const index = Number(stepInput.value);
  show(index);
  status.textContent = frames[index].label;
});

saveButton.addEventListener("click", async () => {
  const { samples } = frames.at(-1);
  let blob;
  if (model.isPoints) {
    blob = new Blob([toCsv(samples, model.info.data_columns)], { type: "text/csv" });
  } else {
    const grid = document.createElement("canvas"); // the page's canvas may show another step
    drawImages(grid, samples, model.info.sample_shape);
    blob = await new Promise((resolve) => grid.toBlob(resolve));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${saveButton.dataset.name}.${model.isPoints ? "csv" : "png"}`;
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
