// Modes: what is asked for, how a text is framed for the model, and the settings that fit. Prompts are those of the
// tasks that models are trained on (docs/data_formats.md, "Task files").

const EXACT = { temperature: 0 };

export const MODES = {
  story: {
    name: "Story", wants: "both", verb: "Continue", placeholder: "Write, or let the model go on",
    about: "Text and images take turns. Begin, and the model goes on.",
    example: { segments: ["On the snow, Tia is a stripy green giraffe and stands on the right side. Rex is a small blue frog with checks and stands in the bottom right corner.", { image: "story" }] },
  },
  caption: {
    name: "Caption", wants: "text", verb: "Describe", placeholder: "Add an image; the model describes it",
    about: "What an image shows, in a sentence.", needsImage: true, frame: { before: "a photo of", after: "" }, framesEmpty: true,
    settings: EXACT, example: { segments: [{ image: "caption" }] },
  },
  question: {
    name: "Question", wants: "text", verb: "Ask", placeholder: "Ask about the image",
    about: "A short answer about an image.", needsImage: true, frame: { label: "Question", before: "Question: ", after: " Short answer:" },
    settings: EXACT, example: { segments: [{ image: "question" }], ask: "Which letter is on the pineapple?" },
  },
  dialogue: {
    name: "Dialogue", wants: "text", verb: "Ask", placeholder: "Ask the next question",
    about: "Questions that follow from each other.", needsImage: true, frame: { label: "Question", before: "question: ", after: " answer:" },
    settings: EXACT,
    example: { segments: [{ image: "dialogue" }, "caption: A red burger, and a purple car in a meadow."], ask: "What color is the car?" },
  },
  drawing: {
    name: "Drawing", wants: "image", verb: "Draw", placeholder: "Describe an image",
    about: "An image from words.", example: { segments: [], ask: "A pink tree to the left of a green diamond." },
  },
  labels: {
    name: "Label map", wants: "image", verb: "Draw", placeholder: "Say what the label map shows",
    about: "An image that follows a coloured map of its objects.", needsImage: true,
    example: { segments: [{ image: "labels" }], ask: "A blue fish can be seen higher up than a purple boat with a bow." },
  },
  find: {
    name: "Find", wants: "text", verb: "Find", placeholder: "Name what to find in the image",
    about: "The model says where something is, and the page shows the box.", needsImage: true,
    frame: { label: "Find", before: "Provide the bounding box coordinate of the region this sentence describes. ", after: "<box>" },
    settings: EXACT, example: { segments: [{ image: "find" }], ask: "the castle" },
  },
};

/** What a text becomes in a mode: fields of its segment. */
export function framed(mode, text) {
  const { frame, framesEmpty } = MODES[mode];
  if (!frame || (!text && !framesEmpty)) return { text };
  return framesEmpty ? { text: text || frame.before } : { text, ...frame };
}

/** The segments of a mode's example, before its question. Images are fetched. */
export async function exampleParts(mode) {
  const parts = [];
  for (const part of MODES[mode].example.segments) {
    if (typeof part === "string") parts.push(part);
    else parts.push(await (await fetch(exampleUrl(part.image))).blob());
  }
  return parts;
}

export const exampleUrl = (name) => `/web/examples/${name}.png`;

/** The image that stands for a mode; null: it has none. */
export const thumbnail = (mode) => MODES[mode].example.segments.find((part) => part.image)?.image ?? null;
