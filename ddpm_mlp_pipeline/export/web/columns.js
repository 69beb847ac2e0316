/** Turn samples into the rows of a table, and known cells into coordinates, as export/FORMAT.md describes. */

const MAX_SIZE = 2 ** 16; // coordinates of a table, knots and categories of a column
const MAX_WHOLE = 2 ** 53;
const MAX_NUMBER = 1e100;
const SECONDS = { D: 86400, s: 1 }; // in a date's unit
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const DATE_PARTS = {
  Y: "(?<Y>\\d{4})", y: "(?<y>\\d{2})", m: "(?<m>\\d{1,2})", b: `(?<b>${MONTHS.join("|")})`, d: "(?<d>\\d{1,2})",
  H: "(?<H>\\d{1,2})", M: "(?<M>\\d{2})", S: "(?<S>\\d{2})",
};
// What stands for an empty cell in a column of numbers
const NO_NUMBER = new Set(
  ["NA", "N/A", "n/a", "#N/A", "na", "NaN", "nan", "NAN", "null", "NULL", "None", "none", "?", "-"],
);
const DECIMAL = /^\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*$/i; // `Number` takes "" and "0x10", too
const ISO_DATE = /^(?<Y>\d{4})-(?<m>\d\d)-(?<d>\d\d)(?:[T ](?<H>\d\d):(?<M>\d\d)(?::(?<S>\d\d))?)?$/;

/**
 * @typedef {string | number | boolean | null} Cell A value; a date counts its unit since 1970, and null is missing.
 * @typedef {object} Range What a known cell is coded by.
 * @property {number} [low] the ends of the range of its continuous coordinate, if it has one
 * @property {number} [high]
 * @property {number[]} signs its other coordinates
 */

const fail = (message) => { throw new RangeError(message); };
const isText = (value) => typeof value === "string" && value !== "" && !/\p{Cs}/u.test(value); // no half of a character

/** Return a value for a message: on one line, and not too long. */
function shown(value) {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 59)}…` : text;
}

function some(values) {
  const first = values.slice(0, 8).map(shown).join(", ");
  return values.length > 8 ? `${first}, … (${values.length} in all)` : first;
}

/** Return the number of sorted numbers that are less than a limit, or, with `orEqual`, at most it. */
function countBelow(sorted, limit, orEqual) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < limit || (orEqual && sorted[middle] === limit)) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Interpolate linearly, with the operations of numpy's `interp`. */
function interpolate(x, xs, ys) {
  const j = countBelow(xs, x, true) - 1;
  if (j < 0) return ys[0];
  if (j === xs.length - 1 || xs[j] === x) return ys[j];
  return ((ys[j + 1] - ys[j]) / (xs[j + 1] - xs[j])) * (x - xs[j]) + ys[j];
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

let normal; // z from −8 to 8 and Φ(z)

/** Return z from −8 to 8 and the normal distribution function Φ(z), to interpolate Φ and its inverse. */
function normalRanks() {
  if (normal) return normal;
  const step = 0.002, density = (z) => Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI);
  const z = Float64Array.from({ length: 8001 }, (_, i) => (i - 4000) * step), ranks = new Float64Array(z.length);
  ranks[0] = 6.22096057427178e-16; // Φ(−8); then Simpson's rule
  for (let i = 1; i < z.length; i++) {
    const sum = density(z[i - 1]) + 4 * density(z[i] - step / 2) + density(z[i]);
    ranks[i] = ranks[i - 1] + (step / 6) * sum;
  }
  return (normal = { z, ranks });
}

/** Return the coordinate in the middle of a range, by rank. */
function middle(low, high) {
  const { z, ranks } = normalRanks();
  const rank = (interpolate(low, z, ranks) + interpolate(high, z, ranks)) / 2;
  return clamp(interpolate(rank, ranks, z), low, high);
}

// Text of numbers, as Python writes them: of two decimals that are equally near, it takes the even one.

function roundHalfEven(value) {
  const floor = Math.floor(value), rest = value - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

/** Return whether a number lies in the middle between two with so many decimals. */
function isTie(value, decimals) {
  if (decimals >= 0) return Math.abs(value * 2 ** (decimals + 1)) % 2 === 1;
  const power = 10n ** BigInt(-decimals);
  return Number.isInteger(value) && BigInt(Math.abs(value)) % power === power / 2n;
}

/** Make the last digit of a number's text even if it is odd. JavaScript takes the larger of two decimals. */
const withEvenEnd = (text) => text.slice(0, -1) + (text.at(-1) & ~1);

/** Return a number with so many decimals. */
function toFixed(value, decimals) {
  if (Math.abs(value) >= 1e21) return BigInt(value) + (decimals ? `.${"0".repeat(decimals)}` : "");
  const text = value.toFixed(decimals);
  return isTie(value, decimals) ? withEvenEnd(text) : text;
}

/** Return a number with as few decimals as needed, but at least `least`. */
function fixed(value, least, most) {
  const text = toFixed(value, Math.max(least, most));
  if (least >= most) return text;
  const [whole, decimals] = text.split("."), kept = decimals.replace(/0+$/, "").padEnd(least, "0");
  return kept ? `${whole}.${kept}` : whole;
}

/** Return a number from a mantissa and an exponent of at least two digits. */
const withExponent = (mantissa, exponent) =>
  `${mantissa}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;

/** Return a number with 9 significant digits at most. */
function general(value) {
  const [mantissa, power] = value.toExponential(8).split("e"), exponent = Number(power);
  if (exponent >= -4 && exponent < 9) return fixed(value, 0, 8 - exponent);
  const digits = isTie(value, 8 - exponent) ? withEvenEnd(mantissa) : mantissa;
  return withExponent(digits.replace(/\.?0+$/, ""), exponent);
}

/** Return the shortest text that stands for a number. */
function shortest(value) {
  const [mantissa, power] = value.toExponential().split("e"), exponent = Number(power);
  if (exponent < -4 || exponent >= 16) return withExponent(mantissa, exponent);
  return Object.is(value, -0) ? "-0" : String(value);
}

/** Return the finite number of a text, or null. */
function parseDecimal(text) {
  const number = DECIMAL.test(text) ? Number(text) : NaN;
  return Number.isFinite(number) ? number : null;
}

// Dates, in UTC

/** Return whether a format has a year, a month and a day, each directive once, and no other directives. */
function isDateFormat(text) {
  const directives = Array.from(text.matchAll(/%(.?)/g), ([, directive]) => directive), has = new Set(directives);
  return directives.every((directive) => Object.hasOwn(DATE_PARTS, directive)) && has.size === directives.length &&
    has.has("Y") !== has.has("y") && has.has("m") !== has.has("b") && has.has("d");
}

/** Return the pattern of the texts of a format. */
function datePattern(format) {
  const parts = format.split(/%(.)/); // literal texts and directives take turns
  const escaped = parts.map((part, i) => (i % 2 ? DATE_PARTS[part] : part.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&")));
  return new RegExp(`^(?:${escaped.join("")})$`, "i");
}

/** Return the seconds since 1970 of a date's parts, or null if there is no such date. */
function secondsOf({ Y, y, m, b, d, H = 0, M = 0, S = 0 }) {
  const year = Y === undefined ? Number(y) + (y >= 69 ? 1900 : 2000) : Number(Y); // the convention of POSIX
  const month = m === undefined ? MONTHS.findIndex((name) => name.toLowerCase() === b.toLowerCase()) : m - 1;
  const date = new Date(0);
  date.setUTCFullYear(year, month, Number(d)); // a 31st of February becomes another month's day
  const isThere = year > 0 && date.getUTCMonth() === month && date.getUTCDate() === Number(d);
  return isThere && H < 24 && M < 60 && S < 60 ? date / 1000 + H * 3600 + M * 60 + Number(S) : null;
}

function writeDate(seconds, format) {
  const date = new Date(seconds * 1000), year = date.getUTCFullYear(), month = date.getUTCMonth();
  const padded = (number, length = 2) => String(number).padStart(length, "0");
  const parts = {
    Y: padded(year, 4), y: padded(year % 100), m: padded(month + 1), b: MONTHS[month], d: padded(date.getUTCDate()),
    H: padded(date.getUTCHours()), M: padded(date.getUTCMinutes()), S: padded(date.getUTCSeconds()),
  };
  return format.replace(/%(.)/g, (_, directive) => parts[directive]);
}

// Columns

/** Check a list of numbers that don't decrease. */
function checkNumbers(name, key, numbers) {
  if (!Array.isArray(numbers) || numbers.length < 1 || numbers.length > MAX_SIZE) {
    fail(`column ${shown(name)}: ${key} must be a list of 1 to ${MAX_SIZE} numbers`);
  }
  if (!numbers.every((number) => typeof number === "number" && Math.abs(number) <= MAX_NUMBER)) {
    fail(`column ${shown(name)}: ${key} must hold numbers, none beyond ${MAX_NUMBER}`);
  }
  if (numbers.some((number, i) => number < numbers[i - 1])) fail(`column ${shown(name)}: ${key} must not decrease`);
  return numbers;
}

function checkDecimals(name, key, value = null) {
  if (value !== null && !(Number.isInteger(value) && value >= 0 && value <= 15)) {
    fail(`column ${shown(name)}: ${key} must be a whole number from 0 to 15, or null`);
  }
  return value;
}

function checkFlag(name, flag = false) {
  if (typeof flag !== "boolean") fail(`column ${shown(name)}: has_missing must be true or false`);
  return flag;
}

/** A column of kind `number`, `integer` or `date`: one continuous coordinate. */
class NumberColumn {
  isNumber = true; // whether it has a continuous coordinate

  constructor(name, kind, column) {
    Object.assign(this, { name, kind });
    [this.z, this.values] = ["z", "values"].map((key) => checkNumbers(name, key, column[key]));
    if (this.z.length !== this.values.length) this.#fail("z and values must be of the same length");
    this.hasMissing = checkFlag(name, column.has_missing);
    this.signNames = this.hasMissing ? [`${name} is missing`] : [];
    this.decimals = kind === "number" ? checkDecimals(name, "decimals", column.decimals) : 0;
    this.digits = kind === "number" ? checkDecimals(name, "digits", column.digits) ?? 0 : 0;
    if (kind !== "number" && !this.values.every((v) => Number.isInteger(v) && Math.abs(v) <= MAX_WHOLE)) {
      this.#fail("values must be whole numbers of at most 2^53");
    }
    if (kind === "date") this.#setFormat(column);
  }

  #fail(what) {
    fail(`column ${shown(this.name)}: ${what}`);
  }

  #setFormat({ format, unit }) {
    if (!isText(format) || !isDateFormat(format)) {
      this.#fail("format must be a date's, with some of %Y %y %m %b %d %H %M %S");
    }
    if (typeof unit !== "string" || !Object.hasOwn(SECONDS, unit)) this.#fail("unit must be D or s");
    Object.assign(this, { dateFormat: format, seconds: SECONDS[unit], pattern: datePattern(format) });
    const first = secondsOf({ Y: 1, m: 1, d: 1 }), last = secondsOf({ Y: 9999, m: 12, d: 31, H: 23, M: 59, S: 59 });
    if (this.values[0] < Math.floor(first / this.seconds) || this.values.at(-1) > Math.floor(last / this.seconds)) {
      this.#fail("dates must be of the years 1 to 9999");
    }
  }

  /** Return the value that a sample's numbers stand for: its coordinate at `number`, the others from `signs` on. */
  decode(points, number, signs) {
    if (this.hasMissing && points[signs] > 0) return null;
    let value = clamp(interpolate(points[number], this.z, this.values), this.values[0], this.values.at(-1));
    if (this.decimals !== null) value = roundHalfEven(value * 10 ** this.decimals) / 10 ** this.decimals;
    return value + 0; // no −0
  }

  /** @param {Cell} value */
  format(value) {
    if (value === null) return "";
    if (this.kind === "date") return writeDate(value * this.seconds, this.dateFormat);
    return this.decimals === null ? general(value) : fixed(value, this.digits, this.decimals);
  }

  /** Text of the least and the greatest value. */
  get range() {
    return `${this.format(this.values[0])} to ${this.format(this.values.at(-1))}`;
  }

  /** Return whether a text stands for an empty cell. */
  isEmpty(text) {
    return text === "" || (this.kind !== "date" && NO_NUMBER.has(text));
  }

  /** @returns {Range} */
  encode(text) {
    const value = this.kind === "date" ? this.#readDate(text) : parseDecimal(text);
    if (value === null) {
      const what = this.kind === "date" ? `date such as ${writeDate(1735603200, this.dateFormat)}` : "finite number";
      this.#fail(`${shown(text)} is not a ${what}`);
    }
    // Values that are rounded to this one (without decimals, to 9 digits), just within the ties
    const half = this.decimals === null ? 5.001e-9 * Math.abs(value) : 0.4999 / 10 ** this.decimals;
    const below = countBelow(this.values, value - half, false), above = countBelow(this.values, value + half, true);
    return {
      low: below === 0 ? -Infinity : this.#between(value - half, below),
      high: above === this.values.length ? Infinity : this.#between(value + half, above),
      signs: this.hasMissing ? [-1] : [],
    };
  }

  #readDate(text) {
    for (const pattern of [this.pattern, ISO_DATE]) {
      const match = pattern.exec(text), seconds = match && secondsOf(match.groups);
      if (seconds !== null) return Math.floor(seconds / this.seconds);
    }
    return null;
  }

  /** Interpolate z between the knots j − 1 and j. */
  #between(value, j) {
    const left = Math.max(j - 1, 0), right = Math.min(j, this.values.length - 1);
    const gap = this.values[right] - this.values[left];
    return this.z[left] + clamp((value - this.values[left]) / (gap || 1), 0, 1) * (this.z[right] - this.z[left]);
  }
}

/** Check the values of a category. */
function checkCategories(name, kind, values) {
  const whatFails = (what) => fail(`column ${shown(name)}: values must ${what}`);
  if (!Array.isArray(values) || values.length < 1 || values.length > MAX_SIZE) {
    whatFails(`be a list of 1 to ${MAX_SIZE} values`);
  }
  const type = typeof values[0], types = kind === "boolean" ? ["boolean"] : ["string", "number"];
  if (!types.includes(type) || !values.every((value) => typeof value === type)) {
    whatFails(`be ${kind === "boolean" ? "booleans" : "strings or numbers, all of one type"}`);
  }
  if (new Set(values).size < values.length) whatFails("differ");
  if (type === "string" && !values.every(isText)) whatFails("be valid texts and not empty");
  if (type === "number" && !values.every((value) => Math.abs(value) <= MAX_NUMBER)) {
    whatFails(`be numbers, none beyond ${MAX_NUMBER}`);
  }
  return values;
}

/** A column of kind `category` or `boolean`: a state, coded as one-hot, or as a range of one coordinate. */
class CategoryColumn {
  /** @type {Map<Cell, string>} */
  #textOf;

  constructor(name, kind, column) {
    Object.assign(this, { name, kind });
    this.values = checkCategories(name, kind, column.values);
    if (!["one_hot", "ranks"].includes(column.coding)) this.#fail("coding must be one_hot or ranks");
    this.isNumber = column.coding === "ranks";
    this.hasMissing = checkFlag(name, column.has_missing);
    this.numStates = this.values.length + Number(this.hasMissing);
    if (this.numStates < 2) this.#fail("a category needs at least 2 states");
    if (this.isNumber) {
      this.z = checkNumbers(name, "z", column.z);
      if (this.z.length !== this.numStates - 1) {
        this.#fail("z must have a number for each pair of neighbouring states");
      }
    }
    this.texts = this.values.map((value) => (typeof value === "number" ? shortest(value) : String(value)));
    if (kind === "boolean" && column.text != null) this.#setTexts(column.text);
    this.#textOf = new Map(this.values.map((value, i) => [value, this.texts[i]]));
    const names = [...this.texts.map((text) => `${name}=${text}`), ...(this.hasMissing ? [`${name} is missing`] : [])];
    this.signNames = this.isNumber ? [] : names;
  }

  #fail(what) {
    fail(`column ${shown(this.name)}: ${what}`);
  }

  #setTexts(texts) {
    const isOf = Array.isArray(texts) && texts.length === this.values.length && texts.every(isText);
    if (!isOf || new Set(texts).size < texts.length) this.#fail("text must hold a different text for each value");
    this.texts = texts;
  }

  decode(points, number, signs) {
    if (this.isNumber) return this.values[countBelow(this.z, points[number], true)] ?? null;
    let state = 0;
    for (let i = 1; i < this.numStates; i++) if (points[signs + i] > points[signs + state]) state = i;
    return this.values[state] ?? null; // the last state is missing
  }

  format(value) {
    return value === null ? "" : this.#textOf.get(value);
  }

  isEmpty(text) {
    return text === "";
  }

  /** @returns {Range} */
  encode(text) {
    let state = this.texts.indexOf(text);
    if (state < 0) state = this.values.indexOf(this.#valueOf(text));
    if (state < 0) this.#fail(`${shown(text)} is not one of its values, ${some(this.texts)}`);
    if (!this.isNumber) return { signs: this.signNames.map((_, i) => (i === state ? 1 : -1)) };
    return { low: this.z[state - 1] ?? -Infinity, high: this.z[state] ?? Infinity, signs: [] };
  }

  /** Return the value of a text that is not written as in the data. */
  #valueOf(text) {
    if (this.kind === "boolean") return { true: true, false: false }[text.toLowerCase()];
    return typeof this.values[0] === "number" ? parseDecimal(text) : undefined;
  }
}

function readColumn(column, i) {
  if (typeof column !== "object" || column === null || Array.isArray(column)) {
    fail(`column ${i} must be an object with a name and a kind`);
  }
  const { name, kind } = column;
  if (!isText(name)) fail(`column ${i} has no name`);
  if (["number", "integer", "date"].includes(kind)) return new NumberColumn(name, kind, column);
  if (["category", "boolean"].includes(kind)) return new CategoryColumn(name, kind, column);
  return fail(`column ${shown(name)} is of the kind ${shown(kind)}, not number, integer, date, category or boolean`);
}

const toCsvLine = (cells) => {
  if (cells.length === 1 && cells[0] === "") return '""\n'; // an empty line would be no row
  return `${cells.map((cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell)).join()}\n`;
};

/**
 * The coding of a table's columns, `columns` of bundle.json.
 *
 * Samples are one flat list, `[numRows, width]`. A row is known by its number, and a column by its number.
 */
export class TableCodec {
  /**
   * @param {object[]} columns
   * @throws {RangeError} if they don't describe columns, with one line
   */
  constructor(columns) {
    if (!Array.isArray(columns) || columns.length < 1 || columns.length > MAX_SIZE) {
      fail(`columns must be a list of 1 to ${MAX_SIZE} columns`);
    }
    /** @type {(NumberColumn | CategoryColumn)[]} */
    this.columns = columns.map(readColumn);
    /** @type {string[]} */
    this.names = this.columns.map(({ name }) => name);
    const names = new Set();
    for (const name of this.names) if (names.size === names.add(name).size) fail(`two columns are named ${shown(name)}`);
    const numbers = this.columns.filter(({ isNumber }) => isNumber);
    /** @type {number} number of coordinates: first the continuous ones, then those that are ±1 */
    this.width = numbers.length + this.columns.reduce((sum, { signNames }) => sum + signNames.length, 0);
    if (this.width > MAX_SIZE) fail(`the columns have ${this.width} coordinates, more than ${MAX_SIZE}`);
    /** @type {string[]} */
    this.coordinateNames = [...numbers.map(({ name }) => name), ...this.columns.flatMap(({ signNames }) => signNames)];
    let number = 0, sign = numbers.length;
    /** Where each column's coordinates begin: its continuous one, and its others. */
    this.places = this.columns.map(({ isNumber, signNames }) => {
      const place = { number, sign };
      number += Number(isNumber);
      sign += signNames.length;
      return place;
    });
  }

  /** Return the number of rows of samples. */
  numRows(points) {
    return points.length / this.width;
  }

  /** @returns {Cell} */
  value(points, row, column) {
    const { number, sign } = this.places[column], start = row * this.width;
    return this.columns[column].decode(points, start + number, start + sign);
  }

  /** Return a row's cells as text, "" for missing ones. */
  texts(points, row) {
    return this.columns.map((column, i) => column.format(this.value(points, row, i)));
  }

  /** Return a row's cells for JSON: numbers, booleans, and texts, also of dates; null for missing ones. */
  cells(points, row) {
    return this.columns.map((column, i) => {
      const value = this.value(points, row, i);
      if (value === null || column instanceof CategoryColumn) return value;
      return column.kind === "date" ? column.format(value) : Number(column.format(value));
    });
  }

  /** Return samples as the text of a CSV file, the same as `ddpm-sample` writes. */
  toCsv(points) {
    const lines = Array.from({ length: this.numRows(points) }, (_, row) => toCsvLine(this.texts(points, row)));
    return toCsvLine(this.names) + lines.join("");
  }

  /**
   * Return the coordinates of a row whose cells are known in part, NaN for the others.
   * @param {Object<string, string>} cells text of the known cells by column; "" is not known
   * @returns {Float64Array} `[width]`
   * @throws {RangeError} if there is no such column, or a text doesn't fit its column, with one line
   */
  encode(cells) {
    const point = new Float64Array(this.width).fill(NaN);
    for (const [name, text] of Object.entries(cells)) {
      const i = this.names.indexOf(name);
      if (i < 0) fail(`there is no column ${shown(name)}, only ${some(this.names)}`);
      if (this.columns[i].isEmpty(text)) continue;
      const { low, high, signs } = this.columns[i].encode(text), { number, sign } = this.places[i];
      if (this.columns[i].isNumber) point[number] = middle(low, high);
      point.set(signs, sign);
    }
    return point;
  }
}
