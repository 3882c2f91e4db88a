// What a keyboard and a screen reader need beside the theme: blocks that scroll take the focus, and
// the search has a name.
document.addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
  document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
});
