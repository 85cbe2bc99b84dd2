(() => {
"use strict";
const $ = id => document.getElementById(id);
const MINUS = "\u2212", PAGE = 10, LONG_PROMPT = 80, PROMPT_TAIL = 40;

const make = (name, kind, text, attributes) => {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  return element;
};

/* ---- the packed rows ---- */

const unpack = async name => {
  const packed = Uint8Array.from(atob($(name).textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};
const cache = new Map();
const once = (key, start) => {
  if (!cache.has(key)) cache.set(key, start());
  return cache.get(key);
};
const varints = bytes => {
  const found = [];
  for (let i = 0; i < bytes.length; i++) {
    let value = bytes[i] & 127;
    for (let shift = 7; bytes[i] > 127; shift += 7) value |= (bytes[++i] & 127) << shift;
    found.push(value);
  }
  return found;
};
const floats = planes => {
  const count = planes.length / 4, bytes = new Uint8Array(planes.length);
  for (let i = 0; i < count; i++) for (let k = 0; k < 4; k++) bytes[4 * i + k] = planes[k * count + i];
  return new Float32Array(bytes.buffer);
};
const rounded = (bytes, [top, ratio]) => {
  const table = Float32Array.from({ length: 256 }, (_, code) => {
    if (code === 0) return 0;
    if (code === 128) return NaN;
    const size = top / ratio ** (127 - (code & 127));
    return code > 128 ? -size : size;
  });
  return Float32Array.from(bytes, code => table[code]);
};

let about, rows, starts;
const texts = block => once(`${block} texts`, async () => varints(await unpack(`d-${block}-t`)));
const kept = block => once(`${block} kept`, async () => {
  const bits = await unpack(`d-${block}-k`);
  return i => bits[i >> 3] >> (i & 7) & 1;
});
const column = (block, index) => once(`${block} ${index}`, async () => {
  const { code, constant } = about.columns[index];
  if (constant) {
    const stays = await kept(block), count = tokensIn(block);
    return Float32Array.from({ length: count }, (_, i) => stays(i) ? about.weight : 0);
  }
  const bytes = await unpack(`d-${block}-${index}`);
  return about.exact ? floats(bytes) : rounded(bytes, code);
});
const named = row => `row ${rows.id[row].toLocaleString("en")}${rows.turn ? `, turn ${rows.turn[row]}` : ""}`;
const blockOf = row => {
  let low = 0, high = about.blocks.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (about.blocks[middle] <= row) low = middle; else high = middle - 1;
  }
  return low;
};
const rowsOf = block => [about.blocks[block], about.blocks[block + 1] ?? rows.id.length];
const tokensIn = block => {
  const [first, last] = rowsOf(block);
  return last === first ? 0 : starts[last - 1].response + starts[last - 1].responses;
};

/* Where each row's tokens, and its response tokens, begin in its block. */
const findStarts = () => {
  const found = [];
  let block = -1, token = 0, response = 0;
  for (let row = 0; row < rows.id.length; row++) {
    if (blockOf(row) !== block) { block = blockOf(row); token = response = 0; }
    const start = { block, token, response, tokens: 0, responses: 0 };
    for (const runs of rows.runs[row]) runs.forEach((length, i) => {
      start.tokens += length;
      if (i % 2 && about.statuses[rows.status[row]] === "scored") start.responses += length;
    });
    found.push(start);
    token += start.tokens;
    response += start.responses;
  }
  return found;
};

/* ---- numbers and texts ---- */

const sign = text => text.replaceAll("-", MINUS).replace("e+", "e");
const short = (value, { exponent, decimals, signed }) => {
  if (Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const text = (value / 10 ** exponent).toFixed(decimals);
  return Number(text) === 0 ? text.replace("-", "") : sign((signed && value > 0 ? "+" : "") + text);
};
/* The shortest number that is this float32; of rounded ones two digits. */
const exact = (value, { signed }) => {
  if (Number.isNaN(value)) return "–";
  const plus = signed && value > 0 ? "+" : "";
  if (!about.exact) return "≈ " + sign(plus + (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(2)))));
  for (let digits = 1; digits < 10; digits++) {
    const found = value.toExponential(digits - 1);
    if (Math.fround(Number(found)) !== value) continue;
    return sign(plus + (value !== 0 && Math.abs(value) < 1e-3 ? found : String(Number(found))));
  }
  return sign(plus + String(value));
};
/* 0 to 16, as `alphatoken_curate.views.heat.levels`: halves go to the even level. */
const level = (value, scale) => {
  const at = 8 + 8 * Math.max(-1, Math.min(1, value / scale)), below = Math.floor(at);
  return at - below === 0.5 ? below + below % 2 : Math.round(at);
};
const shownText = number => about.shown[number] ?? about.texts[number];
const alone = number => {
  const text = shownText(number).replaceAll("\n", "");
  return /^\p{M}/u.test(text) ? "\u25cc" + text : text;
};
/* Text whose spaces at either end are seen, and copied as spaces. */
const spaced = (parent, text) => {
  const [, before, middle, after] = /^( *)([^]*?)( *)$/.exec(text);
  for (const space of before) parent.append(make("span", "sp", space));
  if (middle) parent.append(middle);
  for (const space of after) parent.append(make("span", "sp", space));
  return parent;
};

/* ---- which rows, in which order ---- */

const state = { column: 0, page: 0, found: [], hits: "", ticket: 0, active: null, pinned: false };
const said = text => { $("said").textContent = text; };

/* Of each row and of each of its branches the text, in lower case, with where each token begins. */
const rowText = async row => {
  const { block, token } = starts[row], stream = await texts(block);
  let at = token;
  return rows.runs[row].map(runs => {
    const begins = [];
    let text = "";
    for (let end = at + runs.reduce((a, b) => a + b, 0); at < end; at++) {
      begins.push(text.length);
      text += about.texts[stream[at]].toLowerCase();
    }
    return { text, begins };
  });
};
const matches = async (row, query) => {
  if (query === `#${rows.id[row]}` || (rows.own[row] ?? "").toLowerCase() === query) return true;
  return (await once(`text ${row}`, () => rowText(row))).some(({ text }) => text.includes(query));
};
const statistics = {
  mean: (values, from, to) => { let sum = 0; for (let i = from; i < to; i++) sum += values[i]; return sum / (to - from); },
  highest: (values, from, to) => { let most = NaN; for (let i = from; i < to; i++) if (!(values[i] <= most)) most = values[i]; return most; },
  lowest: (values, from, to) => { let least = NaN; for (let i = from; i < to; i++) if (!(values[i] >= least)) least = values[i]; return least; },
};
const share = async row => {
  if (!about.masked || rows.out.has(row)) return NaN;
  const { block, response, responses } = starts[row], stays = await kept(block);
  let count = 0;
  for (let i = 0; i < responses; i++) count += stays(response + i);
  return count / responses;
};
const difference = async row => {
  const { block, response, responses } = starts[row], values = await column(block, state.column);
  const first = rows.runs[row][0].reduce((sum, length, i) => sum + (i % 2 ? length : 0), 0);
  return statistics.mean(values, response, response + first) - statistics.mean(values, response + first, response + responses);
};
const statistic = async (name, row) => {
  const { block, response, responses } = starts[row];
  if (name === "row") return rows.id[row];
  if (name === "tokens") return responses;
  if (name === "omega" || name === "margin") return rows[name][row] ?? NaN;
  if (!responses) return NaN;
  if (name === "kept") return share(row);
  if (name === "difference") return difference(row);
  return statistics[name](await column(block, state.column), response, response + responses);
};

const search = async () => {
  const ticket = ++state.ticket;
  const query = $("query").value.toLowerCase(), source = $("source").value, status = $("status").value;
  if (query) said("Searching…");
  const found = [];
  for (let row = 0; row < rows.id.length; row++) {
    if (source !== "" && rows.source[row] !== Number(source)) continue;
    if (status !== "" && rows.status[row] !== Number(status)) continue;
    if (query && !await matches(row, query)) continue;
    if (ticket !== state.ticket) return;
    found.push(row);
  }
  const by = $("sort").value, turn = $("order").getAttribute("aria-pressed") === "true" ? -1 : 1;
  const keys = new Map();
  for (const row of found) keys.set(row, await statistic(by, row));
  if (ticket !== state.ticket) return;
  const last = row => Number.isNaN(keys.get(row));
  found.sort((a, b) => last(a) - last(b) || (last(a) ? 0 : turn * (keys.get(a) - keys.get(b))) || a - b);
  Object.assign(state, { found, hits: query, page: 0 });
  await render(ticket);
};

/* ---- drawing rows ---- */

const options = [];
const drawBranch = async (row, number, from, responseFrom, hits) => {
  const runs = rows.runs[row][number], { block } = starts[row], stream = await texts(block);
  const scored = about.statuses[rows.status[row]] === "scored", out = rows.out.has(row);
  const stays = about.masked && !out && scored ? await kept(block) : null;
  const found = about.columns[state.column], values = scored ? await column(block, state.column) : null;
  const name = about.branches[number], total = runs.reduce((a, b) => a + b, 0);
  const label = `Tokens of ${named(row)}${name && `, ${name}`}`;
  const text = make("div", "text", undefined, { role: "listbox", tabindex: "0", "aria-label": label, "aria-describedby": "help" });
  const parts = [];
  let at = 0, response = 0;
  runs.forEach((length, i) => {
    for (const end = at + length; at < end; at++) {
      const responds = i % 2 === 1 && scored, token = stream[from + at], index = responseFrom + response;
      const span = make("span", "p", undefined, { role: "option", "aria-selected": "false" });
      const one = { span, row, number, token, position: at, index: responds ? index : -1, place: responds ? ++response : 0, state: "" };
      if (responds) {
        one.state = stays ? (stays(index) ? "kept" : "dropped") : "";
        span.className = `t l${level(values[index], found.scale)}${one.state === "dropped" ? " d" : ""}`;
      } else if (i % 2) span.className = "p r";
      if (hits.has(at)) span.classList.add("hit");
      spaced(span, shownText(token));
      if (!span.textContent.trim()) span.setAttribute("aria-label", "space");
      parts.push(one);
    }
  });
  const prompt = runs[0] > LONG_PROMPT && total > runs[0] ? runs[0] - PROMPT_TAIL : 0;
  const hidden = parts.slice(0, prompt);
  const ellipsis = make("span", "cut", "… ", { "aria-hidden": "true" });
  text.append(...(prompt ? [ellipsis] : []), ...parts.slice(prompt).map(one => one.span));
  text.tokens = parts;
  text.shownFrom = prompt;
  parts.forEach(one => { one.list = text; one.span.token = one; });
  const holder = make("div", "branch");
  if (name) holder.append(make("h4", "", name));
  if (prompt) {
    const more = make("button", "more", `Show ${prompt} more tokens of the prompt`, { type: "button" });
    more.addEventListener("click", () => {
      ellipsis.replaceWith(...hidden.map(one => one.span));
      text.shownFrom = 0;
      more.remove();
      text.focus();
    });
    if (hidden.some(one => one.span.classList.contains("hit"))) queueMicrotask(() => { ellipsis.replaceWith(...hidden.map(one => one.span)); text.shownFrom = 0; more.remove(); });
    holder.append(more);
  }
  if (!total) text.append(make("span", "p", "no tokens"));
  holder.append(text);
  return { holder, total, response };
};
const hitsOf = async (row, number) => {
  const found = new Set();
  if (!state.hits) return found;
  const { text, begins } = (await once(`text ${row}`, () => rowText(row)))[number];
  for (let at = text.indexOf(state.hits); at >= 0; at = text.indexOf(state.hits, at + 1)) {
    begins.forEach((begin, i) => {
      const end = begins[i + 1] ?? text.length;
      if (begin < at + state.hits.length && end > at) found.add(i);
    });
  }
  return found;
};
const fact = (parent, text, kind) => parent.append(make("span", kind, text));
const drawRow = async row => {
  const { block, token, response, responses } = starts[row], status = about.statuses[rows.status[row]];
  const card = make("article", "row", undefined, { "aria-labelledby": `row-${row}` });
  const head = make("header");
  head.append(make("h3", "", `R${named(row).slice(1)}`, { id: `row-${row}` }));
  const place = make("span");
  place.append(make("bdi", "", about.sources[rows.source[row]]), `:${rows.line[row]}`);
  head.append(place);
  if (rows.shownOwn[row] !== null) { const own = make("span", "", "id "); own.append(make("bdi", "", rows.shownOwn[row])); head.append(own); }
  if (status !== "scored") fact(head, status === "target" ? "held out as target" : status, "status");
  if (rows.margin && rows.margin[row] !== null) fact(head, sign(`margin ${rows.margin[row].toPrecision(3)}, omega ${rows.omega[row].toPrecision(3)}`));
  if (rows.out.has(row)) fact(head, "not in the mask");
  const kept = await share(row);
  if (responses && !Number.isNaN(kept)) fact(head, `${Math.round(kept * responses)} of ${responses} kept`);
  if (responses) {
    const unit = about.columns[state.column], values = await column(block, state.column);
    const power = unit.exponent ? sign(` × 1e${unit.exponent}`) : "";
    fact(head, `mean ${unit.label} ${short(statistics.mean(values, response, response + responses), unit)}${power}`);
  }
  card.append(head);
  const reason = about.reasons[rows.id[row]];
  if (reason) { const told = make("p", "note", "Refused: "); told.append(make("bdi", "", reason)); card.append(told); }
  const branches = make("div", "branches");
  let at = token, responded = response;
  for (let number = 0; number < about.branches.length; number++) {
    const drawn = await drawBranch(row, number, at, responded, await hitsOf(row, number));
    at += drawn.total;
    responded += drawn.response;
    if (drawn.total) branches.append(drawn.holder);
  }
  card.append(branches);
  return card;
};

const render = async ticket => {
  const first = state.page * PAGE, shown = state.found.slice(first, first + PAGE);
  const cards = [];
  for (const row of shown) cards.push(await drawRow(row));
  if (ticket !== state.ticket) return;
  leave();
  $("list").replaceChildren(...cards);
  drawLegend();
  const total = state.found.length;
  const which = total > PAGE ? `Rows ${first + 1} to ${Math.min(first + PAGE, total)} of ${total.toLocaleString("en")}` : total === 1 ? "1 row" : `${total} rows`;
  $("which").textContent = which;
  said(total ? `${which}${$("query").value ? " found" : ""}.` : "No row is like that. Clear the search, or choose all sources and statuses.");
  $("before").disabled = $("first").disabled = state.page === 0;
  $("after").disabled = $("last").disabled = first + PAGE >= total;
  $("pages").hidden = total <= PAGE;
  document.documentElement.dataset.ready = ticket;
};
const turn = page => {
  state.page = page;
  render(++state.ticket).then(() => { $("list").scrollIntoView(); $("list").focus({ preventScroll: true }); });
};

const drawLegend = () => {
  const unit = about.columns[state.column];
  const end = short(unit.scale, { ...unit, signed: true });
  $("low").textContent = unit.signed ? end.replace("+", MINUS) : "";
  $("high").textContent = unit.signed ? end : end.replace("+", "");
  $("unit").textContent = `${unit.label}, ${unit.unit}`;
  $("doc").textContent = unit.doc;
  $("legend").classList.toggle("half", !unit.signed);
};

/* ---- one token ---- */

const leave = () => {
  if (state.active) {
    state.active.span.classList.remove("active");
    state.active.span.setAttribute("aria-selected", "false");
    state.active.span.removeAttribute("id");
    state.active.list.removeAttribute("aria-activedescendant");
  }
  state.active = null;
  state.pinned = false;
  $("told").hidden = true;
  $("help").hidden = false;
  $("token").classList.add("idle");
};
const describe = async one => {
  const { block } = starts[one.row], all = [];
  if (one.index >= 0) for (let i = 0; i < about.columns.length; i++) all.push((await column(block, i))[one.index]);
  return all;
};
const enter = async (one, pin) => {
  leave();
  state.active = one;
  state.pinned = Boolean(pin);
  one.span.classList.add("active");
  one.span.id = "active";
  const kind = about.kinds[one.token] >= 0 ? about.classes[about.kinds[one.token]] : "";
  const role = one.place ? `token ${one.place} of the response` : one.span.classList.contains("r") ? "response, not scored" : "prompt";
  const numbers = await describe(one);
  if (state.active !== one) return;
  const chosen = about.columns[state.column];
  const told = one.place ? `, ${chosen.label} ${exact(numbers[state.column], chosen)}${one.state && `, ${one.state}`}` : "";
  one.span.setAttribute("aria-label", `${alone(one.token).trim() || "space"}, ${role}${told}`);
  one.span.setAttribute("aria-selected", "true");
  one.list.setAttribute("aria-activedescendant", "active");
  $("piece").replaceChildren(spaced(make("bdi"), alone(one.token)));
  const weight = one.state === "dropped" ? "dropped: weight 0" : one.state;
  $("about").textContent = [named(one.row), about.branches[one.number], role, `position ${one.position}`, kind, weight].filter(Boolean).join(" · ");
  $("numbers").replaceChildren(...numbers.map((value, i) => {
    const unit = about.columns[i], line = make("tr", i === state.column ? "chosen" : "");
    const swatch = make("span", Number.isNaN(value) ? "swatch" : `swatch l${level(value, unit.scale)}`);
    const name = make("th", "", undefined, { scope: "row" });
    name.append(swatch, unit.label);
    line.append(name, make("td", "n", exact(value, unit)));
    return line;
  }));
  $("told").hidden = false;
  $("help").hidden = true;
  $("token").classList.remove("idle");
  if (pin) one.span.scrollIntoView({ block: "nearest" });
};
const beside = (one, down) => {
  const from = one.span.getBoundingClientRect(), across = from.left + from.width / 2;
  let best = null, least = Infinity;
  for (const other of one.list.tokens.slice(one.list.shownFrom)) {
    const box = other.span.getClientRects()[0];
    if (!box || (down ? box.top < from.bottom - 3 : box.bottom > from.top + 3)) continue;
    const distance = Math.abs(box.top - from.top) * 4 + Math.abs((box.left + box.right) / 2 - across);
    if (distance < least) { least = distance; best = other; }
  }
  return best;
};
const keys = event => {
  const list = event.target.closest?.(".text");
  if (!list || !list.tokens.length || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { leave(); return; }
  const active = state.active?.list === list ? state.active : null;
  const from = active ? list.tokens.indexOf(active) : -1;
  const last = list.tokens.length - 1;
  const wanted = {
    ArrowRight: () => list.tokens[Math.min(from + 1, last)],
    ArrowLeft: () => list.tokens[Math.max(from - 1, list.shownFrom)],
    ArrowDown: () => active && beside(active, true),
    ArrowUp: () => active && beside(active, false),
    Home: () => list.tokens[list.shownFrom],
    End: () => list.tokens[last],
  }[event.key];
  if (!wanted) return;
  event.preventDefault();
  const one = active ? wanted() : firstOf(list);
  if (one) enter(one, true);
};
const firstOf = list => list.tokens.find(one => one.place) ?? list.tokens[list.shownFrom];

/* ---- the page ---- */

const theme = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const now = (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
    $("theme").setAttribute("aria-pressed", String(now));
    return now;
  };
  $("theme").hidden = false;
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = show() ? "light" : "dark"; show(); });
  dark.addEventListener("change", show);
  show();
};
const listen = () => {
  let wait = 0;
  $("query").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(search, 200); });
  for (const id of ["source", "status", "sort"]) $(id).addEventListener("change", search);
  $("order").addEventListener("click", () => {
    $("order").setAttribute("aria-pressed", String($("order").getAttribute("aria-pressed") !== "true"));
    search();
  });
  $("column").addEventListener("change", () => {
    state.column = Number($("column").value);
    if (["mean", "highest", "lowest", "difference"].includes($("sort").value)) search();
    else render(++state.ticket);
  });
  $("first").addEventListener("click", () => turn(0));
  $("before").addEventListener("click", () => turn(state.page - 1));
  $("after").addEventListener("click", () => turn(state.page + 1));
  $("last").addEventListener("click", () => turn(Math.ceil(state.found.length / PAGE) - 1));
  $("close").addEventListener("click", () => { const list = state.active?.list; leave(); list?.focus(); });
  $("list").addEventListener("keydown", keys);
  $("list").addEventListener("focusin", event => {
    const list = event.target.closest(".text");
    if (list?.tokens.length && list.matches(":focus-visible") && state.active?.list !== list) enter(firstOf(list), true);
  });
  $("list").addEventListener("pointerover", event => {
    const one = event.target.closest?.(".t, .p")?.token;
    if (one && one !== state.active && !state.pinned) enter(one, false);
  });
  $("list").addEventListener("click", event => {
    const one = event.target.closest?.(".t, .p")?.token;
    if (one) state.active === one && state.pinned ? leave() : enter(one, true);
  });
};

const start = async () => {
  theme();
  if (!$("d-about")) return;
  about = JSON.parse(new TextDecoder().decode(await unpack("d-about")));
  rows = about.rows;
  rows.out = new Set(rows.out);
  starts = findStarts();
  listen();
  await search();
};
start().catch(error => said(`The rows cannot be shown: ${error.message}. A browser of 2023 or later is needed.`));
})();
