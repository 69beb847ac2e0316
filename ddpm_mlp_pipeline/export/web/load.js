/** Open the page's bundle with the ONNX Runtime beside it, in the page itself or in a worker. */

import { BundleError, oneLine, openBundle } from "./ddpm.js";

/** ONNX Runtime's files, by the provider that runs the network. */
const FILES = {
  wasm: ["ort.wasm.bundle.min.js", "ort-wasm-simd-threaded.wasm.gz"],
  webgpu: ["ort.webgpu.bundle.min.js", "ort-wasm-simd-threaded.asyncify.wasm.gz"],
};
/** The network's nodes that stay on the CPU: WebGPU promises three digits of a sine, and embeddings need more. */
const ON_CPU = ["sin", "cos"].flatMap((kind) => Array.from({ length: 64 }, (_, i) => `${kind}_${i}`));

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

/**
 * Open the bundle in the folder `bundle` beside this file.
 * @param {"wasm" | "webgpu"} provider what runs the network
 * @param {number} numThreads of `"wasm"`; more than one need shared memory
 * @returns {Promise<import("./ddpm.js").Sampler>}
 * @throws {BundleError} if a file can't be fetched or doesn't fit the others
 */
export async function loadBundle(provider = "wasm", numThreads = 1) {
  const ort = await loadRuntime(provider, numThreads);
  return openBundle(ort, (name) => fetchBytes(`bundle/${name}`), {
    executionProviders: [provider === "webgpu" ? { name: provider, forceCpuNodeNames: ON_CPU } : provider],
  });
}
