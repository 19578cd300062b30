// Loaded before the style sheet is used, so that a page in the dark does not flash. A classic script: modules wait.
(() => {
  let stored = null;
  try {
    stored = localStorage.getItem("mmi-theme");
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // blocked: as the system
  }
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
})();
