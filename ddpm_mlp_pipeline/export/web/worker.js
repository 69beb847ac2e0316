/** Run the sampler in a worker, one step per request of the page, so that the page stays responsive. */

import { oneLine, repeated } from "./ddpm.js";
import { loadBundle } from "./load.js";

let sampler, steps;

const answers = {
  async open({ provider, numThreads }) {
    sampler = await loadBundle(provider, numThreads);
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
