// The table: searched, filtered by a layer, sorted by any column; all of a record on request.

const FIRST_ROWS = 100; // more are added on request: a thousand rows take half a second
const TEXTS = ["name", "at", "kind", "action", "reason", "dtype", "file"];
const collator = new Intl.Collator("en", { numeric: true });
const table = { sort: null, descending: false, all: false };

function headers() {
  return PAGE.files.length > 1 ? [["file", "report", null], ...PAGE.headers] : PAGE.headers;
}

function isNumber(key) {
  return !TEXTS.includes(key);
}

function makeHeaders(update) {
  byId("headers").replaceChildren(
    ...headers().map(([key, label]) => {
      const button = element("button", { type: "button" }, label);
      button.addEventListener("click", () => {
        if (table.sort !== key) Object.assign(table, { sort: key, descending: isNumber(key) });
        else if (table.descending === isNumber(key)) table.descending = !table.descending;
        else table.sort = null; // the third time: as in the model
        update();
      });
      return element(
        "th",
        { scope: "col", class: isNumber(key) ? "number" : "", "data-key": key },
        button,
      );
    }),
  );
}

function filtered(rows, query, layer) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter((row) => {
    if (layer && row.at !== layer) return false;
    const text = TEXTS.map((key) => row[key] ?? "")
      .join(" ")
      .toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

// Return rows in the order of a column; what has no value comes last either way.
function sorted(rows) {
  const { sort: key, descending } = table;
  if (!key) return rows;
  const empty = (value) => value === null || value === undefined || value === "";
  return [...rows].sort((a, b) => {
    const [x, y] = [a[key], b[key]];
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    const order = typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y);
    return descending ? -order : order;
  });
}

function showTable(rows, query, layer) {
  const found = sorted(filtered(rows, query, layer));
  const visible = table.all ? found : found.slice(0, FIRST_ROWS);
  byId("rows").replaceChildren(...visible.map(tableRow));
  for (const header of byId("headers").children) {
    const sorts = header.dataset.key === table.sort;
    header.setAttribute(
      "aria-sort",
      sorts ? (table.descending ? "descending" : "ascending") : "none",
    );
    header.firstChild.textContent =
      header.firstChild.textContent.replace(/ [▲▼]$/, "") +
      (sorts ? (table.descending ? " ▼" : " ▲") : "");
  }
  byId("count").textContent =
    `${found.length} of ${rows.length} rows` +
    (layer ? `, layer ${layer}` : "") +
    (visible.length < found.length ? `; the first ${visible.length} are shown` : "");
  byId("more").hidden = visible.length === found.length;
  byId("more").textContent = `Show all ${found.length}`;
}

function tableRow(row) {
  const cells = headers().map(([key, , digits]) => {
    const value =
      digits !== null && typeof row[key] === "number" ? row[key].toFixed(digits) : shown(row[key]);
    if (key !== "name") return element("td", { class: isNumber(key) ? "number" : key }, value);
    const button = element(
      "button",
      { type: "button", "aria-expanded": "false", title: "Show all of its record" },
      row.name,
    );
    button.addEventListener("click", () => toggle(button, row));
    return element("th", { scope: "row" }, button);
  });
  return element("tr", {}, ...cells);
}

function toggle(button, row) {
  const line = button.closest("tr");
  const open = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!open));
  line.classList.toggle("chosen", !open);
  if (open) line.nextElementSibling.remove();
  else
    line.after(
      element(
        "tr",
        { class: "details" },
        element("td", { colSpan: headers().length }, details(row)),
      ),
    );
}
