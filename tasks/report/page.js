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
    const value = event.target.dataset?.value;
    note.hidden = !value;
    if (!value) return;
    note.textContent = value;
    const left = Math.min(event.clientX + 12, window.innerWidth - note.offsetWidth - 8);
    note.style.left = `${Math.max(8, left)}px`;
    note.style.top = `${Math.max(8, event.clientY - note.offsetHeight - 12)}px`;
  }
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, show);
  document.addEventListener("scroll", () => { note.hidden = true; }, { passive: true });
})();
