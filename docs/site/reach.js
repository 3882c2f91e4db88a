// What a keyboard and a screen reader need beside the theme: blocks that scroll take the focus, the
// search and each part of the menu have a name, and buttons of a block of code are no landmark.
document.addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
  document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
  for (const nav of document.querySelectorAll(".md-sidebar--primary nav[aria-labelledby]")) {
    const link = nav.parentElement.querySelector(":scope > .md-nav__container > .md-nav__link");
    if (!link) continue; // its label has the name
    nav.removeAttribute("aria-labelledby");
    nav.setAttribute("aria-label", link.textContent.trim());
  }
  const quiet = () => {
    for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) {
      nav.setAttribute("role", "none");
    }
  };
  quiet(); // the theme adds them when it has loaded
  new MutationObserver(quiet).observe(document.body, { childList: true, subtree: true });
});
