// Server-sent events of a fetch response.

/**
 * Yields the JSON of each event in a stream of bytes.
 *
 * Chunks may end anywhere, also within a character. Comments (which keep the connection alive) and fields other than
 * `data` are skipped; an event that lacks its end when the stream ends is dropped, as the standard demands.
 */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const from = Math.max(0, rest.length - 3); // a separator may be split between two chunks
      rest += value;
      let start = 0;
      for (const end of blockEnds(rest, from)) {
        const data = dataOf(rest.slice(start, end.index));
        start = end.index + end.length;
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
      rest = rest.slice(start);
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may have failed already
  }
}

function* blockEnds(text, from) {
  const separator = /\r\n\r\n|\n\n|\r\r/g;
  separator.lastIndex = from;
  for (let match = separator.exec(text); match; match = separator.exec(text)) {
    yield { index: match.index, length: match[0].length };
  }
}

function dataOf(block) {
  return block
    .split(/\r\n|\n|\r/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(line[5] === " " ? 6 : 5))
    .join("\n");
}
