/** Show samples as the rows of an HTML table. The names of its columns are buttons that sort it. */

export const MAX_ROWS = 200; // shown; a file has all

const collator = new Intl.Collator("en", { numeric: true });

/** Compare two values of a column. Missing ones are last in both directions. */
function compare(a, b, isDescending) {
  if (a === null || b === null) return Number(a === null) - Number(b === null);
  const order = typeof a === "string" ? collator.compare(a, b) : a - b;
  return isDescending ? -order : order;
}

/** Return a new element with properties and children. */
export function create(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export class RowsTable {
  #table; #summary; #codec; #headers;
  #points = null;
  #column = null; // that the rows are sorted by
  #isDescending = false;

  /**
   * @param {HTMLTableElement} table an empty table
   * @param {HTMLElement} summary what tells the number of rows
   * @param {import("./columns.js").TableCodec} codec
   */
  constructor(table, summary, codec) {
    [this.#table, this.#summary, this.#codec] = [table, summary, codec];
    this.#headers = codec.names.map((name, i) => {
      const button = create("button", { type: "button", textContent: name });
      button.addEventListener("click", () => this.#sortBy(i));
      return create("th", { scope: "col", className: this.#classOf(i) }, button);
    });
    table.createTHead().append(create("tr", {}, ...this.#headers));
    table.createTBody();
  }

  #classOf(i) {
    return ["number", "integer"].includes(this.#codec.columns[i].kind) ? "number" : "";
  }

  /** Sort by a column: ascending, then descending, then as drawn. */
  #sortBy(i) {
    const isNew = this.#column !== i;
    this.#column = !isNew && this.#isDescending ? null : i;
    this.#isDescending = !isNew && !this.#isDescending;
    this.#headers.forEach((header, j) => {
      if (j !== this.#column) header.removeAttribute("aria-sort");
      else header.setAttribute("aria-sort", this.#isDescending ? "descending" : "ascending");
    });
    this.show(this.#points);
  }

  /** Return the numbers of the rows to show, in order. */
  #rows() {
    const rows = Array.from({ length: this.#points ? this.#codec.numRows(this.#points) : 0 }, (_, row) => row);
    if (this.#column !== null) {
      const values = rows.map((row) => this.#codec.value(this.#points, row, this.#column));
      rows.sort((a, b) => compare(values[a], values[b], this.#isDescending));
    }
    return rows.slice(0, MAX_ROWS);
  }

  /** @param {Float32Array | null} points `[numRows, codec.width]`, or null for no rows */
  show(points) {
    this.#points = points;
    const rows = this.#rows(), [body] = this.#table.tBodies;
    while (body.rows.length > rows.length) body.deleteRow(-1);
    while (body.rows.length < rows.length) {
      body.append(create("tr", {}, ...this.#headers.map((_, i) => create("td", { className: this.#classOf(i) }))));
    }
    rows.forEach((row, i) => {
      this.#codec.texts(points, row).forEach((text, j) => { body.rows[i].cells[j].textContent = text; });
    });
    this.#summary.textContent = this.#describe(rows.length);
  }

  #describe(numShown) {
    if (!numShown) return "No rows yet";
    const number = this.#codec.numRows(this.#points), all = number.toLocaleString("en");
    const rows = numShown < number ? `The first ${numShown} of ${all} rows` : `${all} row${number === 1 ? "" : "s"}`;
    const by = this.#column === null ? "" : `, by ${this.#codec.names[this.#column]}`;
    return `${rows}${by}${by && this.#isDescending ? ", descending" : ""}`;
  }
}
