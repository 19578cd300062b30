"""Reading and writing of files, paths, text, JSON and images for the whole package.

    errors     InputError for what is given and cannot be used, OutputError for what cannot be written, nearest_name
    text       check_text, check_type, read_json, read_json_lines, parse_json
    paths      resolve_inside, find_file
    images     open_image, load_image, load_pixels (not imported here, since it needs Pillow)
    writing    write_atomic, write_json, write_image, append, atomic_folder, lock_folder, lock_fresh_folder

It imports neither PyTorch nor NumPy.
"""

from .errors import InputError, OutputError, UserError, close_name, nearest_name, sentences
from .paths import FileSlice, find_file, resolve_inside
from .text import (
    MAX_LINE,
    check_list,
    check_strings,
    check_text,
    check_type,
    decode_text,
    parse_json,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
)
from .writing import (
    append,
    atomic_folder,
    encode_image,
    json_lines,
    lock_folder,
    lock_fresh_folder,
    put_in_place,
    write_atomic,
    write_image,
    write_json,
    write_json_lines,
    writing,
)

__all__ = [
    "MAX_LINE", "FileSlice", "InputError", "OutputError", "UserError", "append", "atomic_folder", "check_list",
    "check_strings", "check_text", "check_type", "close_name", "decode_text", "encode_image", "find_file",
    "json_lines", "lock_folder", "lock_fresh_folder", "nearest_name", "parse_json", "put_in_place", "read_json",
    "read_json_lines", "read_lines", "read_text", "resolve_inside", "sentences", "write_atomic", "write_image",
    "write_json", "write_json_lines", "writing",
]  # fmt: skip
