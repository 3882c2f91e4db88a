// Keeps the rows of a page's table that hold every word of the search box.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("filter");
  const rows = [...document.querySelectorAll(".md-content tbody tr")];
  if (!box) return;
  const show = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let kept = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      kept += !row.hidden;
    }
    document.getElementById("filtered").textContent = `${kept} of ${rows.length} rows`;
  };
  box.addEventListener("input", show);
  show();
});
