// The operator page. Everything shown goes in as text, never as markup: ids and notes are others' words.

const KEY = "credits-token";
const SECONDS = 3;
const LIST_MAX = 200;
const $ = (id) => document.getElementById(id);
const state = { merchant: null, timer: null };

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = String(text);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const number = (value) => Number(value).toLocaleString("en");
const counted = (value, what) => `${number(value)} ${what}${value === 1 ? "" : "s"}`;
const minute = (text) => (text ? text.slice(5, 16).replace("T", " ") : "");
const moment = (text) => (text ? text.slice(0, 19).replace("T", " ") : "");

class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `the server answered ${status}`);
    this.status = status;
  }
}

async function ask(path) {
  const answer = await fetch(path, { headers: { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, body);
  return body;
}

// Tables: columns are [title, what to show, class]; what to show is text or an element.

function table(rows, columns, none) {
  if (!rows.length) return element("p", none, { class: "none" });
  const made = element("table");
  fill(made, rows, columns);
  return made;
}

function fill(made, rows, columns, rowAttributes = () => ({})) {
  const head = element("tr");
  for (const [title, , kind] of columns) head.append(element("th", title, { scope: "col", class: kind || "" }));
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr", null, rowAttributes(row));
    for (const [, show, kind] of columns) {
      const cell = element("td", null, { class: kind || "" });
      const shown = show(row);
      cell.append(shown instanceof Node ? shown : String(shown ?? ""));
      line.append(cell);
    }
    body.append(line);
  }
  const top = element("thead");
  top.append(head);
  made.replaceChildren(top, body);
}

const alarming = (value, above = 0) => element("span", number(value), value > above ? { class: "bad" } : {});

// Over time

function series(history) {
  const points = [];
  for (let i = 1; i < history.length; i++) {
    const [before, now] = [history[i - 1], history[i]];
    const seconds = now.at - before.at;
    let [applied, lag] = [0, 0];
    for (const [name, [total, waiting]] of Object.entries(now.merchants)) {
      applied += Math.max(0, total - (before.merchants[name] ? before.merchants[name][0] : total));
      lag += waiting;
    }
    if (seconds > 0) points.push({ at: now.at, rate: applied / seconds, lag });
  }
  return points;
}

function draw(id, points, member) {
  const values = points.map((point) => point[member]);
  const last = values.length ? values[values.length - 1] : 0;
  $(`${id}-now`).textContent = member === "rate" ? `${number(Math.round(last))} / s` : number(last);
  $(`${id}-from`).textContent = points.length ? ago(points[0].at) : "";
  $(`${id}-top`).textContent = values.length ? `at most ${number(Math.round(Math.max(...values)))}` : "";
  if (values.length < 2) return;
  const [top, from, until] = [Math.max(...values, 1) * 1.1, points[0].at, points[points.length - 1].at];
  const place = (point) => `${(((point.at - from) / (until - from)) * 600).toFixed(1)} ${(120 - (point[member] / top) * 116).toFixed(1)}`;
  const line = `M${points.map(place).join("L")}`;
  const svg = "http://www.w3.org/2000/svg";
  const paths = [["area", `${line}L600 120L0 120Z`], ["line", line]].map(([kind, d]) => {
    const path = document.createElementNS(svg, "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    return path;
  });
  $(id).replaceChildren(...paths);
}

function ago(at) {
  const minutes = Math.round((Date.now() / 1000 - at) / 60);
  return minutes < 1 ? "less than a minute ago" : `${minutes} min ago`;
}

// The board

async function refresh() {
  const seen = await ask("/operator/data/status");
  const points = series(seen.history);
  draw("rate", points, "rate");
  draw("lag", points, "lag");
  $("summary").textContent = `${counted(seen.workers.length, "worker")} · ${counted(seen.merchants.length, "merchant")} · control lag ${number(seen.control_lag)} · times are UTC`;
  fill($("merchants"), seen.merchants, [
    ["merchant", (m) => choose(m)],
    ["state", (m) => stateOf(m)],
    ["lag", (m) => alarming(m.lag, 10000), "number"],
    ["applied", (m) => number(m.applied), "number"],
    ["open operations", (m) => number(m.gauges.open_operations || 0), "number"],
    ["parked", (m) => number(m.gauges.parked_commands || 0), "number"],
    ["dead letters", (m) => alarming(m.gauges.dead_letters_open || 0), "number"],
    ["need attention", (m) => alarming(m.gauges.purchases_needing_attention || 0), "number"],
    ["receipt gaps", (m) => alarming(m.gauges.receipts_gaps || 0), "number"],
  ], (m) => ({ "aria-selected": String(m.merchant_id === state.merchant) }));
  if (state.merchant) showRefusals(seen.refusals[state.merchant] || {});
  state.refusals = seen.refusals;
}

function stateOf(m) {
  if (m.error) return element("span", m.error, { class: "bad" });
  const kind = m.state === "active" ? "good" : "warn";
  return element("span", m.simulated ? `${m.state}, simulated` : m.state, { class: `tag ${kind}` });
}

function choose(m) {
  const button = element("button", m.merchant_id, { type: "button", class: "link" });
  button.addEventListener("click", () => guarded(() => open(m.merchant_id)));
  return button;
}

async function open(name) {
  state.merchant = name;
  $("merchant").hidden = false;
  $("merchant-title").textContent = name;
  $("account").replaceChildren();
  $("attention").replaceChildren();
  $("letters").replaceChildren();
  showRefusals((state.refusals || {})[name] || {});
  const [attention, letters] = await Promise.all([
    ask(`/v1/merchants/${name}/purchases?needs_attention=true&limit=50`),
    ask(`/operator/data/dead-letters?merchant=${name}`),
  ]);
  $("attention").replaceChildren(table(attention.items, [
    ["payment", (p) => p.external_ref || "unreadable"],
    ["reason", (p) => (p.error ? p.error.code : p.status)],
    ["times", (p) => number(p.times || 1), "number"],
    ["since", (p) => minute(p.first_refused_at || p.refused_at || p.noted_at)],
  ], "Every paid order was settled."));
  $("letters").replaceChildren(table(letters.items, [
    ["place", (l) => `${l.topic}/${l.partition}/${l.offset}`],
    ["code", (l) => element("span", l.code, { title: l.message })],
    ["noted", (l) => minute(l.noted_at)],
  ], "None."));
  await refresh();
}

function showRefusals(codes) {
  const found = Object.entries(codes).sort((a, b) => b[1] - a[1]);
  const most = found.length ? found[0][1] : 1;
  const lines = found.map(([code, times]) => {
    const line = element("div", null, { class: "bar" });
    line.append(element("span", code), element("progress", null, { max: most, value: times, "aria-label": code }), element("span", number(times)));
    return line;
  });
  $("refusals").replaceChildren(...(lines.length ? lines : [element("p", "None.", { class: "none" })]));
}

// An account

async function account(user) {
  const base = `/v1/merchants/${state.merchant}/users/${encodeURIComponent(user)}`;
  $("account").replaceChildren();
  const balance = await ask(`${base}/balance`);
  const [lots, entries] = await Promise.all([ask(`${base}/lots?limit=100`), newest(base, balance.as_of.user_seq)]);
  const figures = element("dl", null, { class: "figures" });
  for (const [title, value] of [["balance", balance.balance], ["spendable", balance.spendable], ["debt", balance.debt], ["entries", balance.as_of.user_seq]]) {
    const figure = element("div");
    figure.append(element("dt", title), element("dd", number(value), value < 0 ? { class: "bad" } : {}));
    figures.append(figure);
  }
  const title = entries.length < balance.as_of.user_seq ? `Ledger, the newest ${entries.length} of ${number(balance.as_of.user_seq)} entries` : "Ledger, newest first";
  const notes = [];
  if (balance.locked) notes.push(element("p", "The account is locked: no operation can be opened.", { class: "warn" }));
  if (balance.open_operation) notes.push(element("p", `Operation ${balance.open_operation.operation_id} is open until ${moment(balance.open_operation.expires_at)}.`));
  $("account").replaceChildren(figures, ...notes, element("h3", "Lots"), table(lots.items, [
    ["lot", (l) => l.lot_id], ["reason", (l) => l.reason], ["product", (l) => l.product_code || ""],
    ["credits", (l) => number(l.credits), "number"], ["left", (l) => number(l.remaining), "number"],
    ["issued", (l) => moment(l.issued_at)], ["expires", (l) => moment(l.expires_at)], ["state", (l) => l.state],
  ], "No lots."), element("h3", title), table(entries, [
    ["seq", (e) => number(e.user_seq), "number"], ["when", (e) => moment(e.created_at)], ["reason", (e) => e.reason],
    ["what", (e) => `${e.resource_amount} ${e.resource_unit}`, "number"], ["operation", (e) => e.operation_id || e.operation_type],
    ["amount", (e) => element("span", number(e.amount), { class: e.amount < 0 ? "bad" : "good" }), "number"],
    ["balance", (e) => number(e.balance_after), "number"], ["", (e) => why(base, e)],
  ], "No entries."));
}

async function newest(base, seq) {
  // The history is listed from its beginning: a long one is shown by the newest entries of the overview.
  if (seq <= LIST_MAX) return (await ask(`${base}/ledger?limit=${LIST_MAX}`)).items.reverse();
  return (await ask(`${base}/overview`)).latest_entries;
}

function why(base, entry) {
  const button = element("button", "explain", { type: "button", class: "link" });
  button.addEventListener("click", () => guarded(async () => {
    const told = await ask(`${base}/ledger/${entry.entry_id}/explain`);
    $("explain-title").textContent = `Entry ${entry.user_seq}: ${number(entry.amount)} credits`;
    $("explanation").replaceChildren(facts(told));
    $("explain").showModal();
  }));
  return button;
}

function facts(value) {
  const list = element("dl", null, { class: "facts" });
  for (const [name, member] of Object.entries(value)) {
    const told = element("dd");
    if (Array.isArray(member)) told.append(...(member.length ? member.map((item) => (typeof item === "object" ? facts(item) : element("p", item))) : ["–"]));
    else if (member && typeof member === "object") told.append(facts(member));
    else told.textContent = String(member);
    list.append(element("dt", name.replaceAll("_", " ")), told);
  }
  return list;
}

// Coming and going

async function guarded(work) {
  try {
    await work();
    $("refused").textContent = "";
  } catch (error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) return leave(error.message);
    if (error instanceof Refused && $("account").isConnected && error.status === 404) {
      $("account").replaceChildren(element("p", error.message, { class: "bad", role: "alert" }));
      return;
    }
    $("summary").textContent = `No answer: ${error.message}`;
  }
}

async function enter() {
  $("enter").hidden = true;
  $("leave").hidden = false;
  $("board").hidden = false;
  await guarded(refresh);
  if (sessionStorage.getItem(KEY) && !state.timer) state.timer = setInterval(() => document.hidden || guarded(refresh), SECONDS * 1000);
}

function leave(message) {
  sessionStorage.removeItem(KEY);
  clearInterval(state.timer);
  Object.assign(state, { timer: null, merchant: null });
  $("board").hidden = $("leave").hidden = true;
  $("merchant").hidden = true;
  $("enter").hidden = false;
  $("summary").textContent = "";
  $("refused").textContent = message || "";
  $("token").focus();
}

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("token").value.trim());
  $("token").value = "";
  enter();
});
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(() => account($("user").value.trim()));
});
$("leave").addEventListener("click", () => leave());
if (sessionStorage.getItem(KEY)) enter();
