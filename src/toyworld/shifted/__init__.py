"""Another toy world for trials of fine-tuning: its kinds, colours, grounds and phrasing never occur in the first one.

    world      what there is: kinds, colours, grounds, places; random scenes and their splits
    drawing    images, boxes and label maps
    language   captions, questions, expressions, dialogues
    stories    stories of several images
    reading    finds the objects in a drawn or generated image, and the objects that a text names

It has the records of the first world (`Scene`, `SceneObject`, `Attributes`), so `mmi toyworld write --world shifted`
writes it with the same writers.
"""
