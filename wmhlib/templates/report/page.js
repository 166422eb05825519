"use strict";
(() => {
  // Tables: a click on a header sorts by it; "0.75 [0.64, 0.84]" by its first number, what is missing last.
  const missing = text => /^(nan|nat|none|<na>|[–—-]?)$/i.test(text);
  const amount = /^([<>≤≥~]?)\s*([-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+−]?inf)\s*(?:[[(±].*|%|[a-zµ]+[²³23]?)?$/i;
  const number = text => {
    const found = text.match(amount);
    return found ? +found[2].replace("−", "-").replace(/,/g, "").replace(/inf/i, "Infinity") : NaN;
  };
  const names = new Intl.Collator("en", {numeric: true, sensitivity: "base"});

  function oneHeaderRow(head) {  // pandas writes the name of the index into a second row
    const [first, second, more] = head.rows;
    if (!second || more || first.cells.length !== second.cells.length) return;
    const pairs = [...first.cells].map((cell, i) => [cell.textContent.trim(), second.cells[i].textContent.trim()]);
    if (pairs.some(([a, b]) => a && b)) return;
    pairs.forEach(([a, b], i) => { first.cells[i].textContent = a || b; });
    second.remove();
  }

  for (const table of document.querySelectorAll("table.dataframe")) {
    const head = table.tHead, body = table.tBodies[0];
    if (!head || !body) continue;
    oneHeaderRow(head);
    const rows = [...body.rows], texts = row => [...row.cells].map(cell => cell.textContent.trim());
    const width = rows.length && rows[0].cells.length;
    const plain = rows.every(row => row.cells.length === width) && [...head.rows].every(row => row.cells.length === width);
    if (!width || !plain || rows.some(row => texts(row).every(text => text === "..."))) continue;
    [...head.rows[head.rows.length - 1].cells].forEach((cell, column) => {
      const values = rows.map(row => texts(row)[column]), given = values.filter(value => !missing(value));
      const numeric = given.length > 0 && given.every(value => !Number.isNaN(number(value)));
      if (numeric) for (const row of [...head.rows, ...rows]) row.cells[column].classList.add("number");
      for (const row of rows) if (row.cells[column].textContent.length > 48) row.cells[column].classList.add("long");
      if (rows.length < 2 || !cell.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.append(button);
      cell.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
        for (const other of cell.parentNode.cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const keyed = rows.map(row => [texts(row)[column], row]);
        keyed.sort(([a], [b]) => missing(a) || missing(b) ? missing(a) - missing(b)
          : sign * (numeric ? (number(a) - number(b) || 0) : names.compare(a, b)));
        body.append(...keyed.map(([, row]) => row));
      });
    });
  }

  // Figures open large.
  const large = document.querySelector("dialog.large");
  for (const button of document.querySelectorAll("button.zoom")) button.addEventListener("click", () => {
    const image = button.querySelector("img");
    Object.assign(large.querySelector("img"), {src: image.src, alt: image.alt});
    large.showModal();
  });
  large.addEventListener("click", () => large.close());

  // Contents: open beside the text on a laptop, folded above it on a phone, the present section marked.
  const contents = document.querySelector(".contents details");
  if (!contents) return;
  const wide = matchMedia("(min-width: 77rem)"), links = [...contents.querySelectorAll("a")];
  const headings = links.map(link => document.getElementById(link.hash.slice(1)));
  const fold = () => { contents.open = wide.matches; };
  const mark = () => {
    const passed = headings.filter(heading => heading.getBoundingClientRect().top < innerHeight / 3).length;
    links.forEach((link, i) => i === passed - 1 ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
  };
  wide.addEventListener("change", fold);
  addEventListener("scroll", mark, {passive: true});
  contents.addEventListener("click", event => { if (event.target.closest("a") && !wide.matches) contents.open = false; });
  fold();
  mark();
})();
