// Code folds to its first line, a cell at a time or all together; a figure opens in full size.
document.addEventListener("DOMContentLoaded", () => {
  const inputs = [...document.querySelectorAll(".cell_input")].filter(input => !input.closest("details"));
  const button = (name, title, onclick) => Object.assign(document.createElement("button"), { className: name, title, ariaLabel: title, onclick });
  const long = inputs.filter(input => input.innerText.trim().includes("\n"));
  const fold = (all, state) => all.forEach(input => input.classList.toggle("folded", state));
  long.forEach(input => input.append(button("fold", "Fold or unfold this code", () => fold([input]))));
  const header = document.querySelector(".article-header-buttons");
  if (long.length && header) {
    const all = button("btn btn-sm fold-all", "Fold or unfold all code", () => fold(long, !long.every(input => input.classList.contains("folded"))));
    all.textContent = "{…}";
    header.prepend(all);
  }
  document.querySelectorAll(".cell_output img").forEach(image => image.addEventListener("click", () => open(image.src)));
});
