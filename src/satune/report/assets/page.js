"use strict";
// The page from its data: head, sections, the choice of the run, the colour scheme.

const DATA = JSON.parse(document.getElementById("data").textContent);

function sectionOf(section) {
  const box = html("section", "", "", html("h2", "", section.title));
  box.id = section.id;
  if (section.text) box.append(html("p", "", section.text));
  const items = section.items.map((item) => {
    if (item.kind === "chart") return chartItem(item, DATA.outcomes);
    return item.kind === "timeline" ? timelineItem(item) : tableItem(item);
  });
  // A chart that nothing stands beside takes the whole row.
  let open = false;
  items.forEach((item, at) => {
    if (item.classList.contains("wide")) return void (open = false);
    open = !open;
    if (open && (items[at + 1]?.classList.contains("wide") ?? true)) item.classList.add("wide");
  });
  box.append(html("div", "items", "", ...items));
  return box;
}

function headOf(run) {
  const box = html("section", "", "", html("h2", "run-title", plain(run.name)), html("p", "path", plain(run.path)));
  box.id = "top";
  if (run.warnings.length) box.append(html("p", "notice", run.warnings.map(plain).join("; ") + "."));
  const facts = run.head.map(([what, figure]) => html("div", figure.length > 26 ? "broad" : "", "", html("dt", "", plain(what)), html("dd", "", plain(figure))));
  box.append(html("dl", "facts", "", ...facts));
  return box;
}

function showRun(at) {
  const run = DATA.runs[at];
  const sections = [...run.sections];
  document.getElementById("page").replaceChildren(
    headOf(run), ...(DATA.runs.length > 1 ? DATA.several.map(sectionOf) : []), ...sections.map(sectionOf), Conversations.box,
  );
  drawFresh();
  const listed = [...(DATA.runs.length > 1 ? DATA.several : []), ...sections, { id: "conversations", title: "Conversations" }];
  document.getElementById("contents").replaceChildren(...listed.map(({ id, title }) => {
    const link = html("a", "", title);
    link.href = `#${id}`;
    return link;
  }));
}

function setUpScheme() {
  const button = document.getElementById("scheme"), order = ["auto", "light", "dark"];
  let now = "auto";
  try { now = localStorage.getItem("satune-scheme") ?? "auto"; } catch { /* a page from a file may have no storage */ }
  const show = () => {
    if (now === "auto") delete document.documentElement.dataset.scheme;
    else document.documentElement.dataset.scheme = now;
    button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[now];
    button.title = "colour scheme";
  };
  button.addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    try { localStorage.setItem("satune-scheme", now); } catch { /* as above: it then lasts as long as the page */ }
    show();
  });
  show();
}

function start() {
  setUpScheme();
  Conversations.start(DATA);
  const choice = document.getElementById("run");
  choice.append(...DATA.runs.map((run, at) => new Option(plain(run.name), at)));
  document.getElementById("run-choice").hidden = DATA.runs.length < 2;
  choice.addEventListener("change", () => showRun(Number(choice.value)));
  showRun(0);
  Conversations.follow();
  if (DATA.stamp) setInterval(renew, 3000);
}

// A page that is served while its run goes on loads itself anew when there is more to see.
async function renew() {
  try {
    const answer = await fetch("stamp");
    if (answer.ok && (await answer.text()) !== DATA.stamp) location.reload();
  } catch { /* whoever served it has ended: what was seen last stays */ }
}

start();
