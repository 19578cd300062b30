// In the frame of the inspection: show the page that comes from the parent, once.
addEventListener("message", (event) => {
  if (event.source !== parent || typeof event.data?.page !== "string") return;
  document.open();
  document.write(event.data.page);
  document.close();
}, { once: true });
