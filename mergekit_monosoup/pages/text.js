// Elements and numbers as people read them. Text is only ever set as text, never as HTML.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6)
    ? value.toExponential(2)
    : value
        .toPrecision(4)
        .replace(/(\.\d*?)0+$/, "$1")
        .replace(/\.$/, "");
}

const HIDDEN = new Set(["at", "kind", "spectrum", "file"]);
const NAMES = {
  k_share: "k / rank",
  rank_share: "effective_rank / rank",
  rel_edit: "edit_norm / delta_norm",
  members: "matrices",
};

// Return all of a row as a list of names and values, but what it does not have.
function details(row) {
  const list = element("dl");
  for (const [key, value] of Object.entries(row)) {
    const empty = value === null || value === "" || value === undefined;
    if (empty || HIDDEN.has(key) || (key === "members" && value === 1)) continue;
    list.append(element("dt", {}, NAMES[key] ?? key), element("dd", {}, shown(value)));
  }
  return list;
}
