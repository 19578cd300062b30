// Loaded before the style sheet is used, so that a page in the dark does not flash. A classic script: modules wait.
(() => {
  const stored = localStorage.getItem("mmi-theme");
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
