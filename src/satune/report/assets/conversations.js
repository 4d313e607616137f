"use strict";
// The browser of conversations: filters over an index by columns, a list that holds only the rows
// in sight, and one, a group, or the first and last of a problem side by side.

const ROW = 54;
const LONG = 6000;
const HEAT = [5, 25, 70, 150, 300]; // hundredths of a nat: chances of 95, 78, 50, 22 and 5 in 100

const Conversations = (() => {
  let index, columns, count = 0, runs = [], files = "";
  let matches = [], current = -1, view = "one";
  const chunks = new Map(), waiting = new Map(), filters = {};
  const box = html("section");
  box.id = "conversations";
  const list = html("div", "list"), spacer = html("div", "spacer"), found = html("p", "found"), detail = html("div", "detail");

  globalThis.satuneChunk = (number, chunk) => {
    chunks.set(number, chunk);
    waiting.get(number)?.forEach((settle) => settle(chunk));
    waiting.delete(number);
  };

  function chunk(number) {
    if (chunks.has(number)) return Promise.resolve(chunks.get(number));
    const inline = document.getElementById(`chunk-${number}`);
    if (inline) {
      chunks.set(number, JSON.parse(inline.textContent));
      return Promise.resolve(chunks.get(number));
    }
    return new Promise((settle) => {
      const others = waiting.get(number);
      if (others) return void others.push(settle);
      waiting.set(number, [settle]);
      const script = html("script");
      script.src = `${encodeURIComponent(files)}/conversations-${String(number).padStart(4, "0")}.js`;
      script.onerror = () => { waiting.get(number)?.forEach((s) => s(null)); waiting.delete(number); };
      document.head.append(script);
    });
  }

  const at = (name, i) => columns[name][i];
  const problemOf = (i) => index.problems[at("problem", i)];
  const whereOf = (i) => (at("stage", i) < 0 ? "" : `${index.parts[at("part", i)] === "training" ? "" : "after "}stage ${at("stage", i)}`) + (at("step", i) > 1 ? `.${at("step", i)}` : "");
  const addressOf = (i) => `#/${[runs[at("run", i)], index.parts[at("part", i)], at("stage", i), at("step", i), at("sample", i), problemOf(i)].map(encodeURIComponent).join("/")}`;
  const flagsOf = (i) => index.flags.filter((_, bit) => at("flags", i) & (1 << bit));
  const sameGroup = (i, j) => ["run", "part", "stage", "step", "problem"].every((name) => at(name, i) === at(name, j));

  function all(test) {
    const hits = [];
    for (let i = 0; i < count; i++) if (test(i)) hits.push(i);
    return hits;
  }

  // ---- filters

  function filter() {
    const text = filters.text.value.trim().toLowerCase();
    const problems = index.problems.map((id, p) => !text || id.toLowerCase().includes(text) || index.previews[p].toLowerCase().includes(text));
    const number = (name) => (filters[name].value === "" ? null : Number(filters[name].value));
    const [run, part, stage, seat, status, flag] = ["run", "part", "stage", "seat", "status", "flag"].map(number);
    const reward = filters.reward.value;
    const { run: R, part: P, stage: S, speakers, status: T, flags, reward: W, problem } = columns;
    matches = all((i) => problems[problem[i]] && (run === null || R[i] === run) && (part === null || P[i] === part)
      && (stage === null || S[i] === stage) && (seat === null || speakers[i] & (1 << seat)) && (status === null || T[i] === status)
      && (flag === null || (flag < 0 ? flags[i] : flags[i] & (1 << flag)))
      && (!reward || (reward === "0" ? W[i] === 0 : reward === "1" ? W[i] === 1 : W[i] > 0 && W[i] < 1)));
    if (filters.order.value) {
      const sign = filters.order.value === "low" ? 1 : -1;
      matches.sort((a, b) => sign * ((W[a] ?? -1) - (W[b] ?? -1)) || a - b);
    }
    found.textContent = `${matches.length.toLocaleString("en")} of ${count.toLocaleString("en")} conversations`;
    spacer.style.height = `${matches.length * ROW}px`;
    list.scrollTop = 0;
    showRows();
  }

  function choice(name, label, options) {
    const select = html("select");
    select.setAttribute("aria-label", label);
    select.append(new Option(label, ""), ...options.map(([text, value]) => new Option(plain(text), value)));
    select.addEventListener("change", filter);
    filters[name] = select;
    select.hidden = options.length < 2 && name !== "flag";
    return select;
  }

  function bar() {
    const search = html("input");
    search.type = "search";
    search.placeholder = "problem";
    search.setAttribute("aria-label", "problem");
    search.addEventListener("input", filter);
    filters.text = search;
    const stages = [...new Set(columns.stage)].filter((stage) => stage >= 0).sort((a, b) => a - b);
    const used = columns.flags.reduce((bits, f) => bits | f, 0);
    const flags = index.flags.map(([name], bit) => [name, bit]).filter(([, bit]) => used & (1 << bit));
    return html("div", "filters", "", search,
      choice("run", "every run", runs.map((name, i) => [name, i])),
      choice("part", "every part", index.parts.map((name, i) => [name, i])),
      choice("stage", "every stage", stages.map((s) => [`stage ${s}`, s])),
      choice("seat", "every seat", index.seats.map((name, i) => [name, i])),
      choice("reward", "every reward", [["reward 0", "0"], ["between", "between"], ["reward 1", "1"]]),
      choice("status", "every status", index.statuses.map((name, i) => [name, i]).filter(([, i]) => columns.status.includes(i))),
      choice("flag", "flagged or not", flags.length ? [["flagged", -1], ...flags] : []),
      choice("order", "as played", [["lowest reward first", "low"], ["highest first", "high"]]));
  }

  // ---- the list

  function showRows() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const rows = matches.slice(first, first + Math.ceil((list.clientHeight || 600) / ROW) + 8);
    spacer.replaceChildren(...rows.map((i, n) => rowOf(i, (first + n) * ROW)));
  }

  function rowOf(i, top) {
    const link = html("a", i === current ? "row current" : "row");
    link.href = addressOf(i);
    link.style.top = `${top}px`;
    const status = index.statuses[at("status", i)];
    const flags = flagsOf(i).map(([name]) => name);
    const extra = [status === "finished" ? "" : status, ...flags].filter(Boolean).join(", ");
    link.append(rewardBadge(at("reward", i)),
      html("span", "what", "", html("b", "", short(problemOf(i), 60)), html("span", "preview", plain(index.previews[at("problem", i)]))),
      html("span", "where", "", html("span", "", `${whereOf(i)} #${at("sample", i)}`), html("span", "extra", extra)));
    return link;
  }

  function rewardBadge(reward) {
    const badge = html("span", "reward", reward === null ? "?" : shown(Math.round(reward * 100) / 100));
    badge.classList.add(reward === 1 ? "full" : reward ? "part" : "zero");
    badge.title = "reward";
    return badge;
  }

  // ---- one conversation, or several side by side

  async function open(i, keep) {
    current = i;
    const top = matches.indexOf(i) * ROW;
    if (top >= 0 && (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight)) list.scrollTop = top - 2 * ROW;
    showRows();
    const group = all((j) => sameGroup(i, j));
    const others = all((j) => at("problem", j) === at("problem", i));
    const ends = firstAndLast(others, i);
    if (!keep) view = "one";
    if (view === "ends" && ends.length < 2) view = "one";
    const chosen = { one: [i], group, ends }[view].slice(0, 16);
    const bodies = await Promise.all(chosen.map(async (j) => ({ j, chunk: await chunk(at("chunk", j)) })));
    if (current !== i) return;
    const button = (name, label, usable, why) => {
      const made = html("button", "", label);
      made.type = "button";
      made.disabled = !usable;
      made.title = why;
      made.setAttribute("aria-pressed", String(view === name));
      made.addEventListener("click", () => { view = name; open(i, true); });
      return made;
    };
    const step = (by, label) => {
      const place = matches.indexOf(i) + by, made = html("a", "button", label);
      if (place >= 0 && place < matches.length) made.href = addressOf(matches[place]);
      return made;
    };
    const back = html("button", "back", "← list");
    back.type = "button";
    back.addEventListener("click", () => { box.classList.remove("opened"); box.scrollIntoView(); });
    const problem = bodies[0].chunk?.problems[problemOf(i)];
    detail.replaceChildren(
      html("div", "tools", "", back,
        button("one", "conversation", true, "its seats side by side"),
        button("group", `group of ${group.length}`, group.length > 1, "the same problem in the same rollout"),
        button("ends", "before and after", ends.length > 1, ends.length > 1 ? "the same problem, first and last time" : "this problem was played in one place only"),
        html("span", "gap"), step(-1, "‹"), step(1, "›")),
      html("h3", "", plain(problemOf(i))),
      problem ? html("div", "problem", "", textOf(problem.text), html("p", "answer", `reference: ${short(problem.answer, 2000)}`)) : html("p", "absent", ""),
      html("div", `boards ${view}`, "", ...bodies.map(({ j, chunk: held }) => boardOf(j, held))),
      heatKey());
    box.classList.add("opened");
    detail.scrollTop = 0;
  }

  function firstAndLast(others, i) {
    const run = others.filter((j) => at("run", j) === at("run", i) && at("part", j) === at("part", i));
    const when = (j) => at("stage", j) * 1e4 + at("step", j);
    const times = run.filter((j) => at("sample", j) === at("sample", i)).sort((a, b) => when(a) - when(b));
    if (times.length > 1 && when(times[0]) < when(times.at(-1))) return [times[0], times.at(-1)];
    // Other runs have played the same problem: the nearest thing to a before and after.
    const elsewhere = others.filter((j) => at("run", j) !== at("run", i) && at("sample", j) === at("sample", i));
    return elsewhere.length ? [i, elsewhere.at(-1)].sort((a, b) => a - b) : [i];
  }

  function boardOf(i, held) {
    const board = html("article", "board");
    const status = index.statuses[at("status", i)];
    const place = [runs.length > 1 ? runs[at("run", i)] : "", index.parts[at("part", i)], whereOf(i), `sample ${at("sample", i)}`];
    const title = html("a", "", place.filter(Boolean).map(plain).join(" · "));
    title.href = addressOf(i);
    board.append(html("header", "", "", rewardBadge(at("reward", i)), title, html("span", `status ${status}`, status),
      ...flagsOf(i).map(([name, says]) => { const chip = html("span", "chip", name); chip.title = says; return chip; })));
    const body = held?.episodes[at("place", i)];
    if (!body) {
      board.append(html("p", "absent", `The file ${files}/conversations-${String(at("chunk", i)).padStart(4, "0")}.js is missing beside this page.`));
      return board;
    }
    board.append(verdictOf(body));
    board.append(turnsOf(body, runs[at("run", i)]));
    return board;
  }

  function verdictOf(body) {
    const rows = [["answer", body.answer ?? "none"], ["grader", body.detail], ["failure", body.failure?.reason]];
    for (const [name, value] of Object.entries(body.components ?? {})) rows.push([name, value]);
    for (const [seat, value] of Object.entries(body.seats ?? {})) rows.push([`seat ${seat}`, value]);
    const list = html("dl", "verdict");
    for (const [name, value] of rows)
      if (value !== undefined && value !== "" && value !== null)
        list.append(html("dt", "", plain(name)), html("dd", "", "", textOf(shown(value))));
    return list;
  }

  // Seats are columns and moments are rows; observations of an environment go across.
  function turnsOf(body, run) {
    const seats = [...new Set(body.turns.map((turn) => turn.seat))];
    const board = html("div", "turns");
    board.style.setProperty("--seats", String(seats.length));
    seats.forEach((seat, n) => {
      const head = html("div", "seat-head", plain(seat));
      head.style.gridColumn = String(n + 2);
      board.append(head);
    });
    let row = 1, moment = null, said = 0;
    const observe = () => {
      for (const [before, text] of body.observations)
        if (before === said) {
          const seen = html("div", "observation", "", html("span", "meta", "observation"), textOf(text));
          seen.style.gridRow = String(++row);
          board.append(seen);
        }
    };
    observe();
    for (const turn of body.turns) {
      if (turn.moment !== moment) {
        moment = turn.moment;
        const label = html("div", "moment", String(moment + 1));
        label.title = `moment ${moment + 1}`;
        label.style.gridRow = String(++row);
        board.append(label);
      }
      const cell = turnOf(turn, run);
      cell.style.gridRow = String(row);
      cell.style.gridColumn = String(seats.indexOf(turn.seat) + 2);
      board.append(cell);
      said += 1;
      observe();
    }
    return board;
  }

  function turnOf(turn, run) {
    const said = [turn.agent === turn.seat ? "" : turn.agent, `v${turn.version}`, turn.tokens ? `${turn.tokens} tokens` : "", turn.cut ? "cut at its limit" : "", turn.dropped ? `${turn.dropped} messages left out` : ""];
    const mean = turn.surprise ? turn.surprise.reduce((a, b) => a + b, 0) / turn.surprise.length : null;
    if (mean !== null) said.push(`mean log p ${(-mean / 100).toFixed(2)}`);
    const cell = html("div", turn.cut ? "turn cut" : "turn", "", html("div", "meta", "", html("b", "", plain(turn.seat)), html("span", "", said.filter(Boolean).map(plain).join(" · "))));
    if (turn.lengths) cell.append(tokensOf(turn));
    else {
      const text = textOf(turn.text);
      if (mean !== null) {
        text.classList.add("whole", `h${heat(mean)}`);
        text.title = `shaded as a whole: ${DATA.runs.find((r) => r.name === run)?.shading[turn.agent] ?? "its tokens are not known"}`;
      }
      cell.append(text);
    }
    return cell;
  }

  const heat = (surprise) => HEAT.filter((least) => surprise >= least).length;

  function tokensOf(turn) {
    const text = plain(turn.text), shaded = html("div", "text");
    let from = turn.lengths[0], upTo = turn.surprise.length;
    if (from) shaded.append(text.slice(0, from));
    if (text.length > LONG) {
      for (upTo = 0, from = turn.lengths[0]; upTo < turn.surprise.length && from < LONG; upTo++) from += turn.lengths[upTo + 1];
      from = turn.lengths[0];
    }
    const show = (first, last) => {
      for (let n = first; n < last; n++) {
        const length = turn.lengths[n + 1], end = n === turn.surprise.length - 1;
        if (!length && !end) continue;
        const logp = -turn.surprise[n] / 100;
        const token = html("span", `h${heat(turn.surprise[n])}`, length ? text.slice(from, from + length) : "∎");
        token.title = `log p ${logp.toFixed(2)}, chance ${(100 * Math.exp(logp)).toPrecision(3)}%${length ? "" : ", end of the message"}`;
        shaded.append(token);
        from += length;
      }
    };
    show(0, upTo);
    if (upTo < turn.surprise.length) shaded.append(more(text.length, () => show(upTo, turn.surprise.length)));
    return shaded;
  }

  function textOf(text) {
    const clean = plain(text), made = html("div", "text", clean.slice(0, LONG));
    if (clean.length > LONG) made.append(more(clean.length, () => made.append(clean.slice(LONG))));
    return made;
  }

  function more(length, show) {
    const button = html("button", "more", `show all ${length.toLocaleString("en")} characters`);
    button.type = "button";
    button.addEventListener("click", () => { button.remove(); show(); });
    return button;
  }

  function heatKey() {
    const key = html("p", "heat-key", "A token's shade: the chance it had when it was sampled. ");
    ["over 95%", "78%", "50%", "22%", "5%", "less"].forEach((label, n) => key.append(html("span", `h${n}`, label)));
    return key;
  }

  // ---- addresses

  function follow() {
    if (!location.hash.startsWith("#/") || !count) return;
    let parts;
    try { parts = location.hash.slice(2).split("/").map(decodeURIComponent); } catch { return; }
    const i = all((j) => addressOf(j) === `#/${parts.map(encodeURIComponent).join("/")}`)[0];
    if (i === undefined) {
      detail.replaceChildren(html("p", "absent", "This page holds no such conversation."));
      box.classList.add("opened");
      return;
    }
    if (box.getBoundingClientRect().top > innerHeight || box.getBoundingClientRect().bottom < 0) box.scrollIntoView();
    open(i, view !== "one" && current >= 0 && !sameGroup(current, i));
  }

  function start(data) {
    ({ conversations: index, files } = data);
    columns = index.columns;
    runs = data.runs.map((run) => run.name);
    count = columns.run.length;
    box.append(html("h2", "", "Conversations"));
    if (!count) {
      box.append(html("p", "absent", "There is no conversation that can be read."));
      return;
    }
    list.append(spacer);
    list.addEventListener("scroll", showRows);
    new ResizeObserver(showRows).observe(list);
    detail.append(html("p", "absent", "Choose a conversation."));
    box.append(bar(), found, html("div", "browser", "", list, detail));
    addEventListener("hashchange", follow);
    filter();
  }

  return { box, start, follow };
})();
