// A page that is opened as a file may start no worker, and the theme then loses its search and its
// theme switch. Run the worker's script in a frame instead, which talks as a worker does.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      const load = address => new Promise((done, failed) => {
        const script = inside.document.createElement("script");
        Object.assign(script, {src: new URL(address, document.baseURI), onload: done, onerror: failed});
        inside.document.body.append(script);
      });
      inside.postMessage = data => {
        const message = new MessageEvent("message", {data});
        this.dispatchEvent(message);
        this.onmessage?.(message);
      };
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      this.ready = load(url);
    }
    postMessage(data) {
      const deliver = () =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}));
      this.ready = this.ready.then(deliver);
    }
    terminate() {
      this.frame.remove();
    }
  };
}
