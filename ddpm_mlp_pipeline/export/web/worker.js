/** Run the sampler in a worker, one step per request of the page, so that the page stays responsive. */

import { BundleError, oneLine, openBundle, repeated } from "./ddpm.js";

let sampler, steps;

async function fetchBytes(path) {
  let response;
  try {
    response = await fetch(new URL(path, import.meta.url));
  } catch {
    throw new BundleError(`${path} can't be fetched: the server doesn't answer`);
  }
  if (!response.ok) throw new BundleError(`${path} can't be fetched: the server answers ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** ONNX Runtime's files, by the provider that runs the network. */
const FILES = {
  wasm: ["ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm.gz"],
  webgpu: ["ort.webgpu.bundle.min.js", "ort-wasm-simd-threaded.asyncify.wasm.gz"],
};
/** The network's nodes that stay on the CPU: WebGPU promises three digits of a sine, and embeddings need more. */
const ON_CPU = ["sin", "cos"].flatMap((kind) => Array.from({ length: 64 }, (_, i) => `${kind}_${i}`));

async function loadRuntime(provider, numThreads) {
  const [script, path] = FILES[provider].map((name) => `onnxruntime/${name}`);
  let ort;
  try {
    ort = await import(`./${script}`);
  } catch (error) {
    throw new BundleError(`${script} can't be loaded: ${oneLine(error)}`);
  }
  const bytes = await fetchBytes(path);
  const isGzip = bytes[0] === 0x1f && bytes[1] === 0x8b; // with some servers, the browser has unpacked it already
  const packed = new Blob([bytes]).stream();
  ort.env.wasm.numThreads = numThreads;
  try {
    const stream = isGzip ? packed.pipeThrough(new DecompressionStream("gzip")) : packed;
    ort.env.wasm.wasmBinary = await new Response(stream).arrayBuffer();
  } catch {
    throw new BundleError(`${path} can't be unpacked: it is damaged, or this browser is too old (it needs DecompressionStream)`);
  }
  return ort;
}

const answers = {
  async open({ provider, numThreads }) {
    const ort = await loadRuntime(provider, numThreads);
    sampler = await openBundle(ort, (name) => fetchBytes(`bundle/${name}`), {
      executionProviders: [provider === "webgpu" ? { name: provider, forceCpuNodeNames: ON_CPU } : provider],
    });
    const { info, table, isGuidable, takesKnown } = sampler;
    let isResampleable = true;
    try {
      repeated(table, 2);
    } catch {
      isResampleable = false;
    }
    // Fitted calls may differ in their guidance: the page shows the mean.
    const scales = table.steps.map((step) => step.guidanceScale).filter((scale) => scale !== 1);
    return {
      info,
      scheduler: table.scheduler,
      clipRange: table.clipRange,
      numCalls: table.steps.length,
      guidanceScale: scales.length ? scales.reduce((sum, scale) => sum + scale) / scales.length : 1,
      isGuidable,
      takesKnown,
      isResampleable,
    };
  },

  /** Return the milliseconds of a step, of the faster of two after one that may compile. */
  async time({ numSamples, asked }) {
    const times = [];
    for (let i = 0; i < 3; i++) {
      const start = performance.now();
      await sampler.steps(numSamples, 0n, 0, asked).next();
      times.push(performance.now() - start);
    }
    return Math.min(...times.slice(1));
  },

  start({ numSamples, seed, asked }) {
    steps = sampler.steps(numSamples, seed, 0, asked);
  },

  async step() {
    const start = performance.now();
    const { index, timestep, x, sample } = (await steps.next()).value;
    const milliseconds = performance.now() - start;
    const initial = index === 0 ? sampler.toDataUnits(x) : undefined;
    return { timestep, milliseconds, initial, sample: sampler.toDataUnits(sample) };
  },
};

onmessage = async ({ data: { id, name, argument } }) => {
  try {
    const result = await answers[name](argument);
    const arrays = [result?.initial, result?.sample].filter(Boolean);
    postMessage({ id, result }, arrays.map((array) => array.buffer));
  } catch (error) {
    postMessage({ id, error: oneLine(error) });
  }
};
