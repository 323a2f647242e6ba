// Values: the point nearest to the pointer or finger says what its <title> says. Without this script the browser shows it.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll(".panel svg")) {
  const dots = [...svg.querySelectorAll(".dot")];
  for (const dot of dots) {
    const title = dot.querySelector("title");
    dot.dataset.says = title.textContent;
    title.remove(); // or the browser would show it a second time
  }
  let near = null;
  const show = (event) => {
    const scale = svg.clientWidth / svg.viewBox.baseVal.width, box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
    let best = 30; // units of the panel
    let found = null;
    for (const dot of dots) {
      if (dot.classList.contains("off")) continue;
      const at = dot.transform.baseVal[0].matrix, far = Math.hypot(at.e - x, at.f - y);
      if (far < best) [best, found] = [far, dot];
    }
    near?.classList.remove("near");
    near = found;
    tip.style.display = near ? "block" : "none";
    if (!near) return;
    near.classList.add("near");
    tip.textContent = near.dataset.says;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const above = event.clientY - tip.offsetHeight - 14;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 8 ? above : event.clientY + 18) + "px";
  };
  const hide = () => {
    near?.classList.remove("near");
    tip.style.display = "none";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  addEventListener("scroll", hide, { passive: true });
}

// Series: a button switches one off in every panel of its figure.
for (const button of document.querySelectorAll(".series button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", shown);
    const of = button.closest("figure").querySelectorAll(`.panel [data-s="${button.dataset.s}"]`);
    for (const part of of) part.classList.toggle("off", !shown);
  });
}

// Tables: a column's name sorts by it, by the first number of a cell where it has one; again turns it round.
const value = (row, i) => {
  const text = row.cells[i].textContent.trim();
  const number = i && text.replaceAll(",", "").match(/^[^\d+-]*([+-]?\d+(\.\d+)?(e[+-]?\d+)?)/);
  return number ? parseFloat(number[1]) : text === "-" || !text ? null : text;
};
const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], i = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [value(row, i), row]);
    rows.sort(([a], [b]) => (a === null ? 1 : b === null ? -1 : (down ? -1 : 1) * compare(a, b))); // empty cells last
    body.append(...rows.map(([, row]) => row));
  });
}
