"use strict";
(() => {
  const walks = new Map([...document.querySelectorAll(".walk")].map((walk) => [walk.dataset.subject, walk]));
  const links = [...document.querySelectorAll("nav a")];
  const back = document.getElementById("back"), next = document.getElementById("next");
  const progress = document.getElementById("progress"), live = document.getElementById("live");
  const SVG = "http://www.w3.org/2000/svg";
  const narrow = matchMedia("(max-width: 700px)");
  let walk = null, at = 0;

  const stepsOf = (found) => [...found.querySelectorAll(":scope > .step")];

  function fromAddress() {
    const [, subject, number] = decodeURI(location.hash).match(/^#(.+?)\/(\d+)$/) || [null, decodeURI(location.hash).slice(1), "1"];
    const found = walks.get(subject) || walks.values().next().value;
    return [found, found.dataset.subject === subject ? Number(number) - 1 : 0];
  }

  function drawProgress(steps) {
    progress.replaceChildren(...steps.map((step, index) => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = `#${step.dataset.address}`;
      const title = step.querySelector("h3").textContent;
      link.title = `${index + 1}. ${title}`;
      link.setAttribute("aria-label", `Step ${index + 1}: ${title}`);
      if (index && step.dataset.phase !== steps[index - 1].dataset.phase) item.className = "turn";
      item.append(link);
      return item;
    }));
  }

  function show(found, index, announce) {
    const isOther = found !== walk;
    const steps = stepsOf(found);
    walk = found;
    at = Math.max(0, Math.min(steps.length - 1, index));
    for (const other of walks.values()) other.classList.toggle("now", other === walk);
    for (const step of document.querySelectorAll(".step.now")) step.classList.remove("now");
    const step = steps[at];
    step.classList.add("now");
    if (isOther) drawProgress(steps);
    [...progress.querySelectorAll("a")].forEach((link, i) => {
      link.classList.toggle("done", i < at);
      i === at ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current");
    });
    for (const link of links) link.dataset.subject === walk.dataset.subject ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    back.setAttribute("aria-disabled", String(at === 0));
    next.setAttribute("aria-disabled", String(at === steps.length - 1));
    drawArrows(step);
    window.scrollTo(0, 0);
    if (announce) live.textContent = [".count", "h3", ".words"].map((part) => step.querySelector(part).textContent).join(". ");
  }

  function go(index) {
    const steps = stepsOf(walk), wanted = Math.max(0, Math.min(steps.length - 1, index));
    if (wanted === at) return;
    show(walk, wanted, true);
    history.replaceState(null, "", `#${steps[at].dataset.address}`);
  }

  function drawArrows(step) {
    step.querySelector(".arrows")?.remove();
    const picture = step.querySelector(".picture"), gets = picture?.querySelector(".gets");
    if (!picture?.querySelector(".wire") || !gets || narrow.matches) return;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("class", "arrows");
    svg.setAttribute("aria-hidden", "true");
    const frame = picture.getBoundingClientRect();
    for (const source of picture.querySelectorAll(".holds .panel")) {
      for (const target of gets.querySelectorAll(".panel")) {
        const s = source.dataset.rank, d = target.dataset.rank;
        const from = source.querySelector(`[data-to="${d}"]`) || source.querySelector('[data-to="all"]');
        const to = target.querySelector(`[data-from="${s}"]`) || target.querySelector('[data-from="sum"]');
        if (!from || !to || !from.querySelector("tbody td")) continue;
        const a = from.getBoundingClientRect(), b = to.getBoundingClientRect();
        // an arrow must not run over the tables of its own panel, nor over the neighbours of a block further down in the other
        const sender = source.getBoundingClientRect(), isLast = a.bottom > sender.bottom - 40;
        const share = (Number(d) + 1) / (gets.children.length + 1);
        const x1 = (isLast ? a.left + a.width / 2 : sender.left + sender.width * share) - frame.left;
        const y1 = (isLast ? a.bottom + 3 : sender.bottom + 1) - frame.top;
        const panel = target.getBoundingClientRect(), isFirst = b.top < target.querySelector(".block").getBoundingClientRect().top + 4;
        const x2 = b.left + b.width / 2 - frame.left + (isFirst ? 0 : panel.width / 6 * (1 + Number(s)) - b.width / 2), y2 = (isFirst ? b.top - 4 : panel.top - 3) - frame.top;
        const bend = (y2 - y1) * 0.55;
        const path = document.createElementNS(SVG, "path");
        path.setAttribute("d", `M${x1},${y1} C${x1},${y1 + bend} ${x2},${y2 - bend} ${x2},${y2 - 8}`);
        path.setAttribute("pathLength", "1");
        const head = document.createElementNS(SVG, "polygon");
        head.setAttribute("points", `${x2 - 6},${y2 - 9} ${x2 + 6},${y2 - 9} ${x2},${y2 + 1}`);
        const group = document.createElementNS(SVG, "g");
        group.setAttribute("class", `r${s}`);
        if (s === d) { path.setAttribute("class", "stays"); path.removeAttribute("pathLength"); }
        group.append(path, head);
        svg.append(group);
      }
    }
    picture.append(svg);
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const page = document.documentElement, atTop = page.scrollTop <= 0, atEnd = page.scrollTop + page.clientHeight >= page.scrollHeight - 2;
    // a table that scrolls sideways keeps its arrow keys
    const scrolls = event.target.closest?.(".scroll") && event.target.scrollWidth > event.target.clientWidth;
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: Infinity };
    // what a presenter's remote control sends; a page that is longer than the screen scrolls first
    if (atEnd) moves.PageDown = at + 1;
    if (atTop) moves.PageUp = at - 1;
    if (!(event.key in moves) || scrolls) return;
    event.preventDefault();
    go(moves[event.key]);
  }

  function print(all) {
    document.documentElement.classList.toggle("print-all", all);
    window.print();
  }

  history.scrollRestoration = "manual";
  // without a script the address scrolls to a step; with one it must not
  for (const step of document.querySelectorAll(".step")) {
    step.dataset.address = step.id;
    step.removeAttribute("id");
  }
  document.documentElement.classList.add("stepping");
  document.querySelector(".controls").hidden = false;
  back.addEventListener("click", () => go(at - 1));
  next.addEventListener("click", () => go(at + 1));
  document.getElementById("print-one").addEventListener("click", () => print(false));
  document.getElementById("print-all").addEventListener("click", () => print(true));
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => show(...fromAddress(), true));
  window.addEventListener("resize", () => drawArrows(stepsOf(walk)[at]));
  if (walks.size) show(...fromAddress(), false);
})();
