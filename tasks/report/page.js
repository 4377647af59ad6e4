// Shows the value under the pointer or finger at once; without this script the browser's own tooltip does, after a while.
(function () {
  const note = document.createElement("output");
  note.className = "value";
  note.hidden = true;
  document.body.append(note);
  for (const title of document.querySelectorAll(".values title")) {
    title.parentNode.dataset.value = title.textContent;
    title.remove();
  }
  function show(event) {
    // Curves may cross or coincide: all values at this point are shown.
    const under = document.elementsFromPoint(event.clientX, event.clientY);
    const values = under.map((element) => element.dataset.value).filter(Boolean);
    note.hidden = !values.length;
    note.textContent = values.reverse().join("\n");
    const left = Math.min(event.clientX + 12, window.innerWidth - note.offsetWidth - 8);
    note.style.left = `${Math.max(8, left)}px`;
    note.style.top = `${Math.max(8, event.clientY - note.offsetHeight - 12)}px`;
  }
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { note.hidden = true; }, { passive: true });
})();
