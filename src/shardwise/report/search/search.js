"use strict";
(() => {
  // what a dot is, under its picture: at once, and for fingers too
  for (const plot of document.querySelectorAll(".plot")) {
    const told = plot.querySelector(".told");
    const tell = (event) => {
      const dot = event.target.closest(".dot-at");
      if (dot) told.textContent = dot.querySelector("title").textContent;
    };
    plot.addEventListener("pointerover", tell);
    plot.addEventListener("click", tell);
  }

  for (const button of document.querySelectorAll("button.copy")) {
    const text = button.closest(".file").querySelector("pre");
    button.hidden = false;
    button.addEventListener("click", async () => {
      const range = document.createRange();
      range.selectNodeContents(text);
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected: copy it";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
