// Small values that the browser keeps. Where it refuses to (blocked cookies), they last as long as the page.

function guarded(name) {
  const memory = new Map();
  const attempt = (work, otherwise) => {
    try {
      return work(window[name]);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return otherwise();
    }
  };
  return {
    get: (key) => attempt((storage) => storage.getItem(key), () => memory.get(key) ?? null),
    set: (key, value) => attempt((storage) => storage.setItem(key, value), () => memory.set(key, value)),
    remove: (key) => attempt((storage) => storage.removeItem(key), () => memory.delete(key)),
  };
}

export const local = guarded("localStorage");
export const session = guarded("sessionStorage");
