"use strict";
// The page is complete without this script, which adds two things: pictures grow when one clicks them, and two
// columns of pictures can be laid over each other.

const one = selector => document.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// ------------------------------------------------------------------------------------------------ large pictures

const dialog = one("dialog"), rows = all(".pictures tr:has([data-zoom])").map(row => all("[data-zoom]", row));
let place = [0, 0];  // row, column

function show(row, column) {
  row = (row + rows.length) % rows.length;
  column = Math.min(Math.max(column, 0), rows[row].length - 1);
  place = [row, column];
  const image = rows[row][column], large = one("[data-large]");
  large.src = image.src;
  large.alt = one("[data-caption]").textContent = image.alt;
  large.className = image.className;
  if (!dialog.open) dialog.showModal();
}

function go(way) {
  const [row, column] = place;
  if (way === "close") dialog.close();
  if (way === "left") column > 0 ? show(row, column - 1) : show(row - 1, Infinity);
  if (way === "right") column + 1 < rows[row].length ? show(row, column + 1) : show(row + 1, 0);
  if (way === "up") show(row - 1, column);
  if (way === "down") show(row + 1, column);
}

rows.forEach((row, i) => row.forEach((image, j) => {
  image.role = "button";
  image.tabIndex = j ? -1 : 0;  // one stop for each row: the arrow keys lead to the others
  image.addEventListener("click", () => show(i, j));
  image.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    show(i, j);
  });
}));
dialog.addEventListener("click", event => go(event.target.dataset.go ?? "close"));
dialog.addEventListener("close", () => rows[place[0]][place[1]].focus());
dialog.addEventListener("keydown", event => {
  const way = event.key.startsWith("Arrow") && event.key.slice(5).toLowerCase();
  if (!way) return;
  event.preventDefault();
  go(way);
});

// ----------------------------------------------------------------------------------------- one above the other

const compare = one(".compare");
if (compare) {
  const [left, right, source] = all("select", compare), [under, over] = all("img", compare);
  const [leftName, rightName] = all(".stage b", compare);

  function update() {
    const images = all("[data-zoom]", one(".pictures").rows[source.selectedIndex + 1]);  // the first row is its head
    for (const [image, select, name] of [[over, left, leftName], [under, right, rightName]]) {
      const { src, alt, className } = images[select.selectedIndex];
      image.src = src;
      image.alt = alt;
      image.classList.toggle("pixels", className.includes("pixels"));
      name.textContent = select.value;
    }
  }

  all("select", compare).forEach(select => select.addEventListener("change", update));
  all("button", compare).forEach(button => button.addEventListener("click", () => {
    const count = source.options.length;
    source.selectedIndex = (source.selectedIndex + Number(button.value) + count) % count;
    update();
  }));
  one(".stage input").addEventListener("input", event =>
    one(".stage").style.setProperty("--at", `${event.target.value}%`));
  compare.hidden = false;
  update();
}
