"use strict";
// The dashboard: asks this pgweir for its figures and draws them. Nothing is loaded from anywhere else.

const STALE_AFTER_MS = 10000;
const LIMITS_EVERY_MS = 5000;
const REST_EVERY_MS = 2000;
const ASK_LIMIT_MS = 8000;
const SHOWN_SECONDS = 900;
const HOLDERS_SHOWN = 100;
const COUNTED_MS = 60000;

const $ = (id) => document.getElementById(id);
let token = "";
let limits = null;
let series = { columns: [], rows: [] };
let blame = null;
// What the pools had counted at the moments of the last minute.
let counted = [];
const fresh = { limits: 0, blame: 0, series: 0 };
const drawn = {};
const failed = { limits: "", blame: "", series: "" };

// ---- words ----

const whole = (n) => Number(n).toLocaleString("en-US", { maximumFractionDigits: 0 });
const rate = (n) => (n >= 100 ? whole(n) : String(Math.round(n * 10) / 10));

function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return seconds(value / 1000);
  return (value >= 100 ? Math.round(value) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " ms";
}

function seconds(value) {
  if (value < 1) return Math.round(value * 1000) + " ms";
  if (value < 60) return (value < 10 ? value.toFixed(1) : Math.round(value)) + " s";
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = units.findIndex(([, size]) => value >= size);
  const [big, size] = units[at];
  const next = units[at + 1];
  const rest = next ? Math.floor((value % size) / next[1]) : 0;
  return Math.floor(value / size) + " " + big + (rest ? " " + rest + " " + next[0] : "");
}

const count = (n, one, many) => whole(n) + " " + (n === 1 ? one : many);

const WORDS = {
  waiting_for_answer: "waits for the server's answer", idle_in_transaction: "idle in transaction",
  settling: "pgweir's own work", idle: "idle", session_mode: "session mode", transaction: "open transaction", query: "query",
  listen: "LISTEN", temp: "temporary table", advisory_lock: "advisory lock", hold_cursor: "WITH HOLD cursor",
  prepare: "SQL PREPARE", load: "LOAD", settings: "many settings", startup: "start-up parameter",
  statements: "prepared statements", unknown: "unknown effect",
};
const STATES = {
  serving: "serves", unknown: "not known yet", unshown: "not yet shown to be on the primary's timeline", lagging: "too far behind",
  out: "failed lately", primary: "follows nobody", other_system: "not the primary's system", other_history: "another history",
  twin: "the same server as another", other_settings: "other settings than the primary",
};
const REASONS = {
  unknown: "not known what it does", write: "writes", lock: "locks", function: "functions not known to read",
  relation: "tables that followers do not have", server: "about the server or session", session: "session", serializable: "serializable",
  open: "batches that do not end, or too long", transaction: "transactions that may write", no_follower: "no follower to be used",
  stale: "no follower fresh enough", rerun: "failed on a follower", hint_primary: "asked for",
};
const word = (key) => WORDS[key] || key;

// ---- elements ----

function make(name, kind, ...children) {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

function draw(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// ---- asking ----

async function ask(path) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(ASK_LIMIT_MS) });
  if (answer.status === 401) throw new Error("token");
  if (answer.status === 503) throw new Error("Its worker does not answer.");
  if (!answer.ok) throw new Error("It answered " + answer.status + ".");
  return answer.json();
}

async function keepAsking(what, path, every, take) {
  for (;;) {
    if (!document.hidden) {
      try {
        take(await ask(typeof path === "function" ? path() : path));
        fresh[what] = Date.now();
        failed[what] = "";
      } catch (error) {
        failed[what] = error.message === "token" ? "token" : error.name === "TimeoutError" || error instanceof TypeError
          ? "It cannot be reached." : error.message;
      }
      show();
    }
    await new Promise((done) => { wake[what] = done; setTimeout(done, every); });
  }
}
const wake = {};
const wakeAll = () => Object.values(wake).forEach((done) => done());

function takeSeries(answer) {
  const time = (row) => row[0];
  const last = series.rows.length ? time(series.rows[series.rows.length - 1]) : 0;
  series.columns = answer.columns;
  series.rows = series.rows.concat(answer.rows.filter((row) => time(row) > last));
  const newest = series.rows.length ? time(series.rows[series.rows.length - 1]) : 0;
  series.rows = series.rows.filter((row) => time(row) > newest - SHOWN_SECONDS);
}

// ---- the whole ----

function show() {
  const problem = failed.limits || failed.series || failed.blame;
  const wantsToken = problem === "token";
  $("login").hidden = !wantsToken;
  // A link sends no token.
  document.querySelector("nav").hidden = wantsToken || token !== "";
  if (wantsToken) {
    $("main").hidden = true;
    return state(token ? "wrong token" : "token", "warn", token ? "That token is not the right one." : "");
  }
  if (!fresh.limits || !fresh.series) {
    return state(problem ? "error" : "Loading", problem ? "bad" : "", problem);
  }
  const age = Date.now() - Math.min(fresh.limits + LIMITS_EVERY_MS - REST_EVERY_MS, fresh.series);
  const published = limits.published_seconds_ago;
  if (age > STALE_AFTER_MS) {
    state("stale", "bad", (problem || "It does not answer.") + " These figures are more than " + seconds(Math.floor(age / 10000) * 10) + " old.");
  } else if (published !== null && published > 5) {
    state("stale", "bad", "The worker has told nothing for more than " + seconds(Math.floor(published / 5) * 5) + ": it hangs.");
  } else if (limits.draining) {
    state("draining", "warn", "It is on its way out: no new clients are taken, transactions are finished.");
  } else if (limits.servers.some((server) => server.pools.some(isDown))) {
    const down = limits.servers.flatMap((server) => server.pools).find(isDown);
    state("not ready", "bad", "Pool " + poolName(down) + ": " + word(down.health).replaceAll("_", " ") + ".");
  } else {
    state(problem ? "retrying" : "live", problem ? "warn" : "good", problem);
  }
  $("version").textContent = limits.version;
  for (const [what, draws] of [["limits", [showTiles, showLimits, showFollowers]], ["series", [showTiles, showCharts]], ["blame", [showHolders]]]) {
    if (drawn[what] !== fresh[what]) draws.forEach((draw) => draw());
    drawn[what] = fresh[what];
  }
  $("main").hidden = false;
}

// Pools of several URLs may have the same names.
const poolName = (pool) => (pool.url ? pool.url + " " : "") + pool.database + "/" + pool.user;

const isDown = (pool) => pool.health === "wrong_credentials" || pool.health === "server_unreachable";

function state(word, kind, notice) {
  if ($("state").textContent !== word) $("state").textContent = word;
  $("state").className = "pill " + kind;
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
  $("notice").className = kind;
  $("notice").hidden = !notice;
}

// ---- tiles ----

function showTiles() {
  const row = series.rows[series.rows.length - 1];
  const at = (name) => (row ? row[series.columns.indexOf(name)] : null);
  const servers = limits.servers;
  const oldest = Math.max(0, ...servers.map((server) => server.oldest_wait_seconds));
  const bound = servers.filter((server) => server.binds).sort((a, b) => a.binds.room - b.binds.room)[0];
  const fits = servers.map((server) => server.sidecars).filter(Boolean)
    .sort((a, b) => a.more_at_present_use - b.more_at_present_use)[0];
  const ends = servers.flatMap((server) => server.limits).map((limit) => limit.exhausted_in_seconds)
    .filter((end) => end !== null).sort((a, b) => a - b)[0];
  const pools = servers.flatMap((server) => server.pools);
  const connections = servers.reduce((sum, server) => sum + server.connections, 0);
  const tiles = [
    ["Clients waiting", whole(limits.clients_waiting), "", oldest ? "the first for " + seconds(oldest) : "nobody waits", limits.clients_waiting > 0],
    ["Room", bound ? whole(bound.binds.room) : "–", "connections", bound ? "bound by the " + scopeName(bound.binds) : "limits not known yet", bound && bound.binds.room === 0],
    ["No room in", ends === undefined ? "–" : ends === 0 ? "now" : seconds(ends), "", ends === undefined ? "not foreseen" : "if it goes on like this", ends !== undefined && ends < 3600],
    ["More sidecars fit", fits ? whole(fits.more_at_present_use) : "–", "", fits && fits.now ? "besides the " + whole(fits.now) + " there are" : "at its present use", fits && fits.more_at_present_use === 0],
    ["Transactions", at("transactions_per_second") === null ? "–" : rate(at("transactions_per_second")), "per s", "query p99 " + ms(at("query_p99_ms")), false],
    ["Own connections", whole(connections), "", count(pools.length, "pool", "pools"), false],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value, unit, note, alarm]) => {
    const shown = make("dd", "value" + (alarm ? " alarm" : ""), value);
    if (unit) shown.append(" ", make("small", "", unit));
    return make("div", "", make("dt", "", name), shown, make("dd", "note", note));
  }));
}

// ---- limits ----

function scopeName(limit) {
  if (limit.scope === "role") return "role " + limit.of;
  if (limit.scope === "database") return "database " + limit.of;
  return limit.scope === "fleet" ? "fleet (db_connections)" : "server";
}

const SHARING = { shared: "shared with the fleet", alone: "not shared (fleet_budget is off)", behind_a_pooler: "behind another pooler" };

function showLimits() {
  const open = new Set([...document.querySelectorAll("#limits details[open]")].map((details) => details.dataset.key));
  const cards = limits.servers.map((server) => {
    const head = make("div", "server-head", make("h3", "", server.server), make("p", "",
      SHARING[server.sharing] + (server.census_seconds_ago === null ? "" : " · counted " + seconds(server.census_seconds_ago) + " ago")
      + (server.last_refusal ? " · refused " + seconds(server.last_refusal.seconds_ago) + " ago" : "")));
    const card = make("div", "card", head);
    if (server.why_no_census) card.append(make("p", "quiet", "Limits not known: " + server.why_no_census + "."));
    for (const limit of server.limits) card.append(showLimit(server, limit, open));
    return card;
  });
  if (!cards.length) cards.push(make("p", "empty", "No client has connected yet, so no server is known."));
  const focused = document.activeElement && document.activeElement.closest("#limits details");
  $("limits").replaceChildren(...cards);
  if (focused) {
    // Whoever goes by keyboard stays where he is.
    const again = [...document.querySelectorAll("#limits details")].find((details) => details.dataset.key === focused.dataset.key);
    if (again) again.querySelector("summary").focus();
  }
}

function showLimit(server, limit, open) {
  const binds = server.binds && server.binds.scope === limit.scope && server.binds.of === limit.of;
  const title = make("b", "", scopeName(limit));
  if (binds) title.append(make("span", "binds", "binds"));
  const total = limit.limit === null ? "no limit" : limit.limit;
  const head = make("div", "limit-head", title, make("span", "", whole(limit.used) + (limit.limit === null ? " used, no limit" : " of " + total + " used")));
  const box = make("div", "limit", head);
  const own = limit.own.connections + limit.own.claims;
  if (limit.limit !== null) {
    const bar = make("div", "bar");
    const parts = [["own", own], ["peers", limit.peers.connections], ["foreign", limit.foreigners.connections],
      ["room", limit.room], ["headroom", Math.max(0, limit.limit - limit.used - limit.room)]];
    for (const [kind, size] of parts) {
      const part = make("span", kind);
      part.style.flexGrow = size;
      bar.append(part);
    }
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", scopeName(limit) + ": " + own + " own, " + limit.peers.connections + " of peers, "
      + limit.foreigners.connections + " of others, room for " + limit.room + ", limit " + limit.limit);
    box.append(bar);
  }
  const parts = make("div", "parts");
  const add = (name, value) => parts.append(make("span", "", name + " ", make("b", "", value)));
  add("this pgweir", whole(own));
  if (limit.pools !== null || limit.peers.connections) add("peers", whole(limit.peers.connections));
  add("others", whole(limit.foreigners.connections));
  if (limit.room !== null) add("room", whole(limit.room));
  if (limit.limit !== null) add("left alone", whole(limit.headroom));
  if (limit.share !== null) add("share of each of " + count(limit.pools, "pool", "pools"), whole(limit.share));
  if (limit.claims) add("logins under way", whole(limit.claims));
  if (limit.waiting_probes) add("wait for room", whole(limit.waiting_probes));
  if (limit.limit !== null) add("trend", trend(limit));
  box.append(parts);
  const named = [...limit.peers.list.map((peer) => ["peer " + peer.tag, peer.connections]),
    ...limit.foreigners.list.map((other) => [other.application_name || "(no name)", other.connections])];
  if (named.length) {
    const details = make("details", "", make("summary", "", "who has them"));
    details.dataset.key = server.server + "/" + limit.scope + "/" + limit.of;
    details.open = open.has(details.dataset.key);
    const names = make("ul", "names", ...named.map(([name, held]) => {
      const shown = make("span", "", name);
      shown.title = name;
      return make("li", "", shown, make("b", "", whole(held)));
    }));
    const unlisted = limit.peers.unlisted + limit.foreigners.unlisted;
    if (unlisted) names.append(make("li", "", "and " + whole(unlisted) + " more names"));
    details.append(names);
    box.append(details);
  }
  return box;
}

function trend(limit) {
  if (limit.exhausted_in_seconds === 0) return "no room";
  if (!limit.trend) return "too early to tell";
  const hourly = limit.trend.connections_per_hour;
  if (hourly === 0) return "none";
  const text = (hourly > 0 ? "+" : "−") + rate(Math.abs(hourly)) + " per hour";
  return text + (limit.exhausted_in_seconds === null ? "" : ", no room in " + seconds(limit.exhausted_in_seconds));
}

// ---- followers ----

const poolKey = (server, pool) => server.server + "\n" + poolName(pool) + "\n" + pool.role;
const TO_FOLLOWERS = ["read", "read_only", "hint"];

function takeLimits(answer) {
  limits = answer;
  const now = Date.now();
  const pools = new Map(answer.servers.flatMap((server) => server.pools.map((pool) => [poolKey(server, pool), pool])));
  counted = counted.filter((moment) => now - moment.at < COUNTED_MS).concat({ at: now, pools });
}

// What was counted in the last minute; of a pool that began anew, since then.
function since(key, count) {
  const newest = counted[counted.length - 1].pools.get(key);
  const oldest = counted[0].pools.get(key);
  const before = counted.length > 1 && oldest ? count(oldest) : 0;
  return count(newest) >= before ? count(newest) - before : count(newest);
}

function showFollowers() {
  const all = limits.servers.flatMap((server) => server.pools.map((pool) => ({ server, pool, key: poolKey(server, pool) })));
  const followers = all.filter(({ pool }) => pool.follower);
  $("followers").hidden = followers.length === 0;
  if (!followers.length) return;
  const transactions = ({ key }) => since(key, (pool) => pool.transactions);
  const percent = (part, whole) => (whole ? Math.round(part / whole * 1000) / 10 + " %" : "–");
  $("routed").textContent = counted.length > 1 ? "in the last minute" : "so far";
  $("follower-rows").replaceChildren(...followers.map((follower) => {
    const { server, pool } = follower;
    const mates = all.filter((other) => poolName(other.pool) === poolName(pool));
    const sum = mates.map(transactions).reduce((a, b) => a + b, 0);
    const { state, lag_seconds: lag, lag_bytes: bytes } = pool.follower;
    const cell = (label, kind, text, below) => {
      const td = make("td", kind, make("span", "", text));
      td.dataset.label = label;
      if (below) td.append(make("span", "quiet", below));
      return td;
    };
    return make("tr", "",
      cell("Server", "name", server.server),
      cell("Pool", "name", poolName(pool)),
      cell("State", state === "serving" ? "" : "alarm", STATES[state] || state),
      cell("Behind", "", lag === null ? "–" : seconds(lag), bytes === null ? "" : count(bytes, "byte", "bytes")),
      cell("Transactions", "", percent(transactions(follower), sum), whole(transactions(follower))));
  }));
  $("routes").replaceChildren(...all.filter(({ pool }) => pool.routes).map(({ pool, key }) => {
    const of = (reason) => since(key, (pool) => (pool.routes || {})[reason] || 0);
    const reasons = Object.keys(pool.routes).map((reason) => [reason, of(reason)]).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
    const sum = (some) => some.reduce((total, [, n]) => total + n, 0);
    const total = sum(reasons);
    const away = sum(reasons.filter(([reason]) => TO_FOLLOWERS.includes(reason)));
    const home = reasons.filter(([reason]) => !TO_FOLLOWERS.includes(reason)).map(([reason, n]) => (REASONS[reason] || reason) + " " + percent(n, total));
    const reruns = since(key, (pool) => pool.reruns), waits = since(key, (pool) => pool.read_waits);
    return make("p", "", poolName(pool) + ": " + percent(away, total) + " of " + count(total, "transaction", "transactions") + " to followers"
      + (home.length ? "; to the primary: " + home.join(", ") : "")
      + (reruns ? "; " + count(reruns, "was run again", "were run again") : "")
      + (waits ? "; " + count(waits, "read waited", "reads waited") + " for a look at the primary" : ""));
  }));
}

// ---- series ----

const CHARTS = [
  ["Connections", whole, [["servers_active", "servers busy"], ["servers_idle", "servers idle"], ["clients_waiting", "clients waiting"]]],
  ["Throughput", (value) => rate(value) + "/s", [["transactions_per_second", "transactions"], ["queries_per_second", "queries"], ["errors_per_second", "errors"]]],
  ["Waits for a server connection", ms, [["wait_p50_ms", "p50"], ["wait_p95_ms", "p95"], ["wait_p99_ms", "p99"]]],
  ["Query time", ms, [["query_p50_ms", "p50"], ["query_p95_ms", "p95"], ["query_p99_ms", "p99"]]],
];

function showCharts() {
  if (!$("charts").childElementCount) {
    $("charts").append(...CHARTS.map(([title, , lines]) => {
      const values = make("div", "values", ...lines.map(([, name], n) =>
        make("span", "", make("i", "swatch " + "abc"[n]), name + " ", make("b", "", "–"))));
      const svg = draw("svg", { viewBox: "0 0 900 150", preserveAspectRatio: "none", role: "img" });
      for (const y of [1, 75, 149]) svg.append(draw("line", { class: "grid", x1: 0, x2: 900, y1: y, y2: y }));
      svg.append(...lines.map((_, n) => draw("path", { class: "line " + "abc"[n] })));
      const plot = make("div", "plot", svg, make("p", "top", ""), make("p", "middle", ""), make("p", "none", "Nothing yet"));
      const ends = make("div", "ends", make("span", "", "15 min ago"), make("span", "", "now"));
      return make("div", "chart", make("h3", "", title), values, plot, ends);
    }));
  }
  CHARTS.forEach(([title, unit, lines], n) => showChart($("charts").children[n], title, unit, lines));
}

function showChart(box, title, unit, lines) {
  const rows = series.rows;
  const newest = rows.length ? rows[rows.length - 1][0] : 0;
  const of = lines.map(([column]) => series.columns.indexOf(column));
  const span = shownSpan();
  const most = ceiling(Math.max(0, ...rows.flatMap((row) => of.map((at) => row[at] || 0))));
  const there = rows.some((row) => of.some((at) => row[at] !== null));
  const words = [];
  lines.forEach(([, name], n) => {
    let path = "", pen = false, before = 0;
    for (const row of rows) {
      const value = row[of[n]];
      if (value === null) { pen = false; continue; }
      const x = 900 - (newest - row[0]) / span * 900;
      // Where nothing was told for a while there is a gap.
      path += (pen && row[0] - before < 10 ? "L" : "M") + x.toFixed(1) + " " + (149 - value / most * 146).toFixed(1);
      if (!pen) path += "h.01";
      pen = true;
      before = row[0];
    }
    box.querySelectorAll("path")[n].setAttribute("d", path);
    const last = rows.length ? rows[rows.length - 1][of[n]] : null;
    const shown = last === null ? "–" : unit(last);
    box.querySelectorAll(".values b")[n].textContent = shown;
    words.push(name + " " + shown);
  });
  box.querySelector("svg").setAttribute("aria-label", title + ", now: " + words.join(", "));
  box.querySelector(".top").textContent = there ? unit(most) : "";
  box.querySelector(".middle").textContent = there ? unit(most / 2) : "";
  box.querySelector(".none").hidden = there;
  box.querySelector(".ends").firstChild.textContent = span / 60 + " min ago";
}

// A pgweir that is young has not much to show: what there is fills the width.
function shownSpan() {
  const rows = series.rows;
  const there = rows.length ? rows[rows.length - 1][0] - rows[0][0] : 0;
  return [60, 180, 300].find((span) => there <= span) || SHOWN_SECONDS;
}

// The next of 2, 4, 6, 8, 10 and their tenfold, so that the scale moves seldom and its half is a plain number.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 2)));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((step) => step >= value && step >= 2) || 10 * power;
}

// ---- holders ----

function showHolders() {
  const holders = blame ? blame.holders : [];
  $("nobody").hidden = holders.length > 0;
  $("holders-box").hidden = holders.length === 0;
  const waiting = limits.clients_waiting;
  const listed = Math.min(holders.length, HOLDERS_SHOWN);
  const all = holders.length + (blame ? blame.unlisted : 0);
  $("held").textContent = all ? whole(all) + (waiting ? ", while " + count(waiting, "client waits", "clients wait") : "")
    + (listed < all ? "; the " + listed + " longest" : "") : "";
  if (blame && blame.silent.length) $("held").textContent += (all ? "; " : "") + "no answer of " + blame.silent.join(", ");
  $("holders").replaceChildren(...holders.slice(0, HOLDERS_SHOWN).map((holder) => {
    const cell = (label, kind, text, below) => {
      const td = make("td", kind, make("span", "", text));
      td.dataset.label = label;
      if (below) td.append(make("span", "quiet", below));
      return td;
    };
    return make("tr", "",
      cell("Held for", "time", seconds(holder.held_seconds)),
      cell("Client", "name", holder.application_name || "(no name)", holder.client),
      cell("Pool", "name", poolName(holder)),
      cell("Doing", "", word(holder.doing), "for " + seconds(holder.doing_seconds)),
      cell("Why", "", holder.why.map(word).join(", ") || "–"),
      cell("Server process", "", String(holder.server_pid)));
  }));
}

// ---- start ----

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token").value = "";
  wakeAll();
});
document.addEventListener("visibilitychange", wakeAll);
setInterval(() => { if (fresh.limits) show(); }, 1000);
keepAsking("limits", "/limits", LIMITS_EVERY_MS, takeLimits);
keepAsking("blame", "/blame", REST_EVERY_MS, (answer) => { blame = answer; });
keepAsking("series", () => "/series" + (series.rows.length ? "?since=" + series.rows[series.rows.length - 1][0] : ""),
  REST_EVERY_MS, takeSeries);
