// Before anything is drawn, so that nothing flashes.
(() => {
  let wanted = null;
  try { wanted = localStorage.getItem("theme"); } catch { /* no storage: the system decides */ }
  if (wanted === "light" || wanted === "dark") document.documentElement.dataset.theme = wanted;
})();
