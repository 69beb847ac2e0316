/** Draw points as a scatter plot and images as a grid on a canvas. */

/**
 * Return axes around the data's mean, with the same scale on both and space for all data.
 * @param {object} info bundle.json
 * @param {number | null} clipRange range of the data in standard deviations
 * @returns {{x: [number, number], y: [number, number], columns: string[]}} ranges in the data's units
 */
export function axesOf({ data_mean: mean, data_std: std, data_columns: columns }, clipRange) {
  const half = (clipRange === null ? 3 : 1.2 * clipRange) * Math.max(...std.slice(0, 2), 1e-12);
  const range = (centre) => [centre - half, centre + half];
  if (std.length > 1) return { x: range(mean[0]), y: range(mean[1]), columns: columns.slice(0, 2) };
  return { x: range(mean[0]), y: [0, 1], columns: [columns[0], ""] };
}

/** Return the first two coordinates of point i; one-dimensional points get a height that separates neighbours. */
function coordinates(points, dimension, i) {
  return dimension > 1 ? [points[i * dimension], points[i * dimension + 1]] : [points[i], (i * 0.618034 + 0.5) % 1];
}

/** Return the number of points outside the axes. */
export function countOutside(points, dimension, axes) {
  let outside = 0;
  for (let i = 0; i < points.length / dimension; i++) {
    const [x, y] = coordinates(points, dimension, i);
    if (x < axes.x[0] || x > axes.x[1] || y < axes.y[0] || y > axes.y[1]) outside++;
  }
  return outside;
}

/** Return three to seven round numbers in a range. */
function ticks([low, high]) {
  const rough = (high - low) / 7, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(6)));
}

/**
 * @param {HTMLCanvasElement} canvas its `data-plot` is set to the plot's [left, top, size] in pixels of the canvas
 * @param {Float32Array | null} points `[number, dimension]`, or null for the axes alone
 * @param {number} dimension
 * @param {ReturnType<typeof axesOf>} axes
 */
export function drawPoints(canvas, points, dimension, axes) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio);
  const font = 12 * ratio, left = Math.round(4 * font), top = Math.round(0.7 * font);
  const size = width - left - top, height = top + size + Math.round(3.2 * font);
  canvas.width = width;
  canvas.height = height;
  canvas.dataset.plot = JSON.stringify([left, top, size]);
  const style = getComputedStyle(canvas), colour = (name) => style.getPropertyValue(name).trim();
  const context = canvas.getContext("2d");
  const toX = (x) => left + ((x - axes.x[0]) / (axes.x[1] - axes.x[0])) * size;
  const toY = (y) => top + ((axes.y[1] - y) / (axes.y[1] - axes.y[0])) * size; // a canvas's y points down

  context.font = `${font}px ${style.fontFamily}`;
  context.strokeStyle = colour("--grid");
  context.lineWidth = ratio;
  const line = (...ends) => {
    context.beginPath();
    context.moveTo(ends[0], ends[1]);
    context.lineTo(ends[2], ends[3]);
    context.stroke();
  };
  context.fillStyle = colour("--muted");
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const x of ticks(axes.x)) {
    line(toX(x), top, toX(x), top + size);
    context.fillText(String(x), toX(x), top + size + 0.5 * font);
  }
  context.fillText(axes.columns[0], left + size / 2, top + size + 1.9 * font);
  context.textAlign = "right";
  context.textBaseline = "middle";
  if (axes.columns[1]) {
    for (const y of ticks(axes.y)) {
      line(left, toY(y), left + size, toY(y));
      context.fillText(String(y), left - 0.5 * font, toY(y));
    }
  }
  context.save();
  context.translate(0.2 * font, top + size / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.textBaseline = "top";
  context.fillText(axes.columns[1], 0, 0);
  context.restore();
  if (!points) return;

  const number = points.length / dimension;
  const radius = (number <= 300 ? 3 : number <= 3000 ? 2 : 1.3) * ratio;
  context.save();
  context.beginPath();
  context.rect(left, top, size, size);
  context.clip();
  context.fillStyle = colour("--ink");
  context.globalAlpha = 0.75;
  for (let i = 0; i < number; i++) {
    const [x, y] = coordinates(points, dimension, i);
    context.beginPath();
    context.arc(toX(x), toY(y), radius, 0, 2 * Math.PI);
    context.fill();
  }
  context.restore();
}

const PAINT = [255, 146, 43];

/**
 * Paint over what lies at a place of the canvas, in its pixels, with a round brush: of one image, not of its neighbours.
 * @param {Uint8Array} paint `[number, height, width]`
 * @param {[number, number, number]} sampleShape
 */
export function paintAt(paint, canvas, [x, y], [, height, width]) {
  const row = Math.floor(y / height), column = Math.floor(x / width), image = row * (canvas.width / width) + column;
  if (column < 0 || x >= canvas.width || row < 0 || (image + 1) * height * width > paint.length) return;
  const radius = Math.max(0.75, Math.min(height, width) / 12);
  for (let pixel = 0; pixel < height * width; pixel++) {
    const dy = Math.floor(pixel / width) + 0.5 - (y % height), dx = (pixel % width) + 0.5 - (x % width);
    if (Math.hypot(dx, dy) <= radius) paint[image * height * width + pixel] = 1;
  }
}

/**
 * Draw images in a roughly square grid, one pixel of the canvas for each pixel of an image.
 * @param {HTMLCanvasElement} canvas
 * @param {Float32Array} images in [0, 1], `[number, height, width, channels]`
 * @param {[number, number, number]} sampleShape `[channels, height, width]`, of 1 or 3 channels
 * @param {Uint8Array | null} paint `[number, height, width]`, 1 where they are painted over
 */
export function drawImages(canvas, images, [channels, height, width], paint = null) {
  const number = images.length / (channels * height * width);
  const columns = Math.ceil(Math.sqrt(number)), rows = Math.ceil(number / columns);
  canvas.width = columns * width;
  canvas.height = rows * height;
  const context = canvas.getContext("2d");
  const grid = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < number; i++) {
    const left = (i % columns) * width, top = Math.floor(i / columns) * height;
    for (let pixel = 0; pixel < height * width; pixel++) {
      const from = (i * height * width + pixel) * channels;
      const to = 4 * ((top + Math.floor(pixel / width)) * canvas.width + left + (pixel % width));
      for (let c = 0; c < 3; c++) grid.data[to + c] = Math.round(255 * images[from + (channels === 3 ? c : 0)]);
      grid.data[to + 3] = 255;
      if (paint?.[i * height * width + pixel]) {
        PAINT.forEach((value, c) => { grid.data[to + c] = 0.25 * grid.data[to + c] + 0.75 * value; });
      }
    }
  }
  context.putImageData(grid, 0, 0);
}
