() => {
    // On a wide screen the upload and the number of photos are unfolded; on a phone the photos found come first.
    const fold = document.querySelector("#more > button, #more .label-wrap");
    if (fold && window.matchMedia("(min-width: 641px)").matches) fold.click();

    // Gradio names some parts for screen readers in other words than those on the screen, or not at all.
    const rename = (selector, name) => document.querySelectorAll(selector).forEach((element) => {
        const text = name(element).replace(/\s+/g, " ").trim();
        if (!text) element.removeAttribute("aria-label");
        else if (element.getAttribute("aria-label") !== text) element.setAttribute("aria-label", text);
    });
    let clicked = null;
    const repair = () => {
        rename("button.thumbnail-lg, button.upload-container", (element) => element.innerText);
        rename("div.empty[aria-label]", () => "");
        rename(".image-container > button", () => "the picture");
        document.querySelectorAll("button.thumbnail-lg img").forEach((image) => { image.alt = ""; });
        const details = document.querySelector("#clicked #details");
        if (details && !clicked) details.scrollIntoView({block: "nearest"});
        clicked = details;
    };
    let waiting = false;
    new MutationObserver(() => {
        if (waiting) return;
        waiting = true;
        setTimeout(() => { waiting = false; repair(); }, 100);
    }).observe(document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ["aria-label"]});
    repair();
}
