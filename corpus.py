"""Where the text comes from: documentation strings of the Python installation at hand, or own files (--data).

The default corpus needs no download: docstrings are read with `ast`, nothing is imported. Own data is a .txt,
a .jsonl recognised by its keys, or a .py file or folder. Either way the result is a list of Records, split by
name into training and held-out ones.
"""
import ast
import gc
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import common
import hardware
from errors import UserError

# ---- the default corpus: docstrings of the installation at hand --------------------------------------------

PACKAGES = ("torch", "numpy", "tiktoken", "tqdm", "matplotlib", "pytest", "sympy", "networkx", "mpmath",
            "fontTools", "PIL", "_pytest", "pygments", "fsspec", "mpl_toolkits", "pyparsing", "jinja2",
            "packaging", "urllib3", "filelock", "dateutil", "requests", "typing_extensions", "contourpy",
            "cycler", "kiwisolver", "idna", "pluggy")
TINY_MODULES = ("argparse", "collections", "email", "json", "logging", "random", "statistics", "urllib")
SKIPPED = {"__pycache__", "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "_vendor"}


@dataclass
class Record:
    """One piece of data. `name` decides the split; a field that the data does not have is None."""
    name: str
    text: str | None = None             # what pretraining reads
    prompt: str | None = None
    response: str | None = None         # a human answer
    chosen: str | None = None
    rejected: str | None = None
    origin: str = ""                    # the file that it came from, or what the file calls its source


def identifier_words(identifier: str) -> list[str]:
    """get_HTTPHeader2 -> get, http, header, 2"""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def function_prompt(signature: str) -> str:
    """The prompt for a function: its signature and a line of its identifier's words.

    >>> function_prompt("def area(width, height):")
    'def area(width, height):\\n# area\\n'
    """
    name = function_name(signature)
    return f"{signature.strip()}\n# {' '.join(identifier_words(name))}\n"


def function_name(prompt: str) -> str:
    """The identifier that a prompt of ours is about; empty when it is no function signature."""
    match = re.match(r"\s*(?:async )?(?:def|class)\s+(?:\w+\.)*(\w+)", prompt)
    return match.group(1) if match else ""


def summary_line(docstring: str) -> str | None:
    """The first sentence of a docstring in plain text, or None where there is none worth learning."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[\w:+-]+:`~?([^`<]+?)(?: <[^>]*>)?`", r"`\1`", paragraph).replace("``", "`")
    sentence = re.match(r".*?[.!?](?=\s+[A-Z`]|$)", paragraph)
    line = sentence.group(0) if sentence else paragraph
    is_prose = line.isascii() and line[:1].isalpha() and ">>>" not in line and "::" not in line
    return line if is_prose and 3 <= len(line.split()) <= 20 else None


def scan_file(path_and_module: tuple[str, str]) -> list[dict]:
    """Every docstring of one source file, after the signature it belongs to. A file that does not parse has
    none.
    """
    path, module = path_and_module
    found = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())          # which may say how it is encoded
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return found

    def add(node, name: str, signature: str):
        docstring = ast.get_docstring(node)
        if not docstring or len(signature) > 200 or not is_unicode(signature + docstring):
            return
        prompt = function_prompt(signature) if not isinstance(node, ast.Module) else f"{signature}\n"
        is_function = signature.startswith("def") and not (name.startswith("__") and name.endswith("__"))
        summary = summary_line(docstring) if is_function and identifier_words(name) else None
        found.append({"name": name, "text": prompt + docstring,
                      "prompt": prompt if summary else None, "response": summary})

    add(tree, module.split(".")[-1], f"module {module}")
    waiting = [(tree, "")]
    while waiting:                              # no recursion: a file may have a thousand elif
        node, owner = waiting.pop()
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            add(node, node.name, f"class {node.name}({bases}):")
            owner = f"{node.name}."
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            add(node, node.name, f"def {owner}{node.name}({argument_names(node.args)}):")
        waiting += [(child, owner) for child in reversed([*ast.iter_child_nodes(node)])
                    if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))]  # no expression
    return found


def argument_names(args: ast.arguments) -> str:
    """a, b, *rest, key, **options: names alone, without annotations and defaults."""
    names = [arg.arg for arg in args.posonlyargs + args.args]
    names += [f"*{args.vararg.arg}"] if args.vararg else ["*"] if args.kwonlyargs else []
    names += [arg.arg for arg in args.kwonlyargs]
    return ", ".join(names + ([f"**{args.kwarg.arg}"] if args.kwarg else []))


def python_files(place: Path, module: str) -> list[tuple[str, str]]:
    """(path, dotted module) of the sources of a package or module, in a fixed order."""
    if place.is_file():
        return [(str(place), module)]
    files = []
    for folder, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if name not in SKIPPED)
        dotted = ".".join([module, *Path(folder).relative_to(place).parts]).strip(".")
        files += [(os.path.join(folder, name), f"{dotted}.{name[:-3]}".replace(".__init__", "").strip("."))
                  for name in sorted(names) if name.endswith(".py") and not name.startswith("test_")]
    return files


def corpus_files(tiny: bool) -> list[tuple[str, str]]:
    """The sources of the default corpus that this installation has."""
    files = [] if tiny else python_files(Path(sysconfig.get_paths()["stdlib"]), "")
    for name in TINY_MODULES if tiny else PACKAGES:
        if spec := importlib.util.find_spec(name):   # finds, does not import
            place = next(iter(spec.submodule_search_locations or [spec.origin]))
            files += python_files(Path(place), name)
    return files


def scan(files: list[tuple[str, str]]) -> list[Record]:
    """All docstrings of these files, cached by the files' names, sizes and times."""
    stats = [(module, os.stat(path)) for path, module in files if os.path.exists(path)]     # no dead link
    inventory = json.dumps([[module, stat.st_size, stat.st_mtime_ns] for module, stat in stats])
    key = hashlib.sha256(inventory.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    cached = common.CACHE / f"docstrings-{key}.jsonl"
    with common.rank_zero_first():
        if not cached.exists():
            lines = [json.dumps(row) + "\n" for row in without_doubles(scan_all(files))]
            common.write_atomically(cached, "".join(lines).encode())
        return [Record(**json.loads(line)) for line in cached.read_text(encoding="utf-8").splitlines()]


def scan_all(files: list[tuple[str, str]]) -> list[dict]:
    """scan_file on every file, in parallel. Without Python's collector of cyclic garbage, which syntax trees
    are not: it would go through every tree again and again, and take as long as all the rest.
    """
    with ProcessPoolExecutor(hardware.cores() if len(files) > 500 else 1, initializer=gc.disable) as pool:
        results = pool.map(scan_file, files, chunksize=16)
        results = tqdm(results, total=len(files), desc="reading docstrings", leave=False, disable=None)
        return [row for rows in results for row in rows]


def without_doubles(found: list[dict]) -> list[dict]:
    """The same text counts once, and of functions with the same summary only the first keeps it as a pair."""
    texts, summaries, kept = set(), set(), []
    for row in found:
        if row["text"] in texts:
            continue
        texts.add(row["text"])
        if row["response"] and row["response"].lower() in summaries:
            row["prompt"] = row["response"] = None
        summaries.add((row["response"] or "").lower())
        kept.append(row)
    return kept


# ---- own data, recognised by its keys ----------------------------------------------------------------------

ACCEPTED = ("text", "prompt + chosen + rejected", "chosen + rejected", "prompt + response",
            "prompt + completion", "instruction + output", "messages", "prompt")
TEXTS = ("", ".txt", ".text", ".md", ".rst")             # suffixes of what is read as it is
TURN = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "\n\n"}    # as hh-rlhf writes them


def load_records(path: str, tiny: bool = False) -> list[Record]:
    """The records of a file or folder, or of several with commas between; of the default corpus where no path
    is given. Faults name file and line.

    A folder means the .jsonl files in it; where it has none, its Python sources; else its texts.
    """
    if not path:
        return scan(corpus_files(tiny))
    places, records = places_of(path), []
    stems = [Path(place).stem for place in places]
    for place, stem in zip(places, stems):
        unique = stem if stems.count(stem) == 1 else f"{Path(place).parent.name}/{stem}"
        for record in load_place(place):
            record.origin = record.origin or unique
            records.append(record)
    return records


def places_of(path: str) -> list[str]:
    """The files that --data means, and the folders whose Python sources it means."""
    def within(folder: str, *suffixes: str) -> list[str]:
        return sorted(str(file) for file in Path(folder).glob("*") if file.suffix in suffixes)

    def texts(folder: str) -> list[str]:
        return [] if python_files(Path(folder), "") else within(folder, *TEXTS[1:])
    names = [path] if os.path.exists(path) else [name.strip() for name in path.split(",") if name.strip()]
    return [place for name in names for place in within(name, ".jsonl") or texts(name) or [name]]


def digest(path: str) -> str:
    """Eight letters that tell one content of --data from another."""
    found = hashlib.sha256()
    for place in places_of(path):
        for file, _ in python_files(Path(place), ""):
            if os.path.exists(file):                                    # no dead link
                found.update(Path(file).name.encode() + Path(file).read_bytes())
    return found.hexdigest()[:8]


def load_place(path: str) -> list[Record]:
    """The records of one file, or of the Python sources in a folder."""
    place = Path(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such file")
    if place.is_dir() or place.suffix == ".py":
        if records := scan(python_files(place, place.stem)):
            return records
        hint = " and no .jsonl; its texts are read where it has no .py file" * place.is_dir()
        raise UserError(f"{path}: it holds no docstrings{hint}")
    if place.suffix not in (".jsonl", *TEXTS):
        raise UserError(f"{path}: it must be .jsonl, .py or text ({', '.join(filter(None, TEXTS))})")
    content = read_file(path)
    records = read_jsonl(path, content) if place.suffix == ".jsonl" else read_text(path, content)
    if not records:
        raise UserError(f"{path}: it is empty")
    return records


def read_file(path: str) -> str:
    """The text of a file, without the mark that some editors put in front."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: str, content: str) -> list[Record]:
    """A plain text as documents of up to 4,000 characters, shorter ones where that makes fewer than ten: cut
    at blank lines; a longer paragraph at the ends of lines, a longer line at a space.
    """
    most, texts = max(200, min(4000, len(content) // 10)), [""]
    for paragraph in re.split(r"\n\s*\n", content):
        glue = "\n\n"
        for part in re.findall(rf"(?s).{{1,{most}}}\Z|.{{0,{most - 1}}}\n|.{{0,{most - 1}}}\s|.{{1,{most}}}",
                               paragraph):
            if texts[-1] and len(texts[-1]) + len(part) > most:
                texts.append("")
            texts[-1] += (glue if texts[-1] else "") + part
            glue = ""
    return [Record(f"{Path(path).name}:{i}", text=text) for i, text in enumerate(texts) if text.strip()]


def read_jsonl(path: str, content: str) -> list[Record]:
    """A .jsonl file: one object a line, recognised by its keys. Faults name file and line."""
    records = []
    for number, line in enumerate(content.split("\n"), start=1):      # JSON may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:              # a number of 5,000 digits, 5,000 brackets
            raise UserError(f"{path}:{number}: not read ({error})") from None
        try:
            found = fields_of(row) if isinstance(row, dict) else []
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if not found:
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}:{number}: found {keys or 'no keys'}; accepted are the keys "
                            + "; ".join(ACCEPTED))
        # all pairs of a dialogue have one name, and go together: that of the first with a question
        first = next((pair for pair in found if TURN["user"] in pair.get("prompt", "")), found[0])
        name = function_name(first.get("prompt", "")) or first.get("prompt") or first["text"]
        for fields in found:
            if wrong := [key for key, text in fields.items() if not is_unicode(text)]:
                raise UserError(f"{path}:{number}: {wrong[0]!r} holds half of a surrogate pair, a character "
                                "that was cut through")
            origin = row["source"] if isinstance(row.get("source"), str) else ""
            records.append(Record(name, **fields, origin=origin))
    return records


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON and Python may escape half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fields_of(row: dict) -> list[dict[str, str]]:
    """What a line's keys mean, as fields of Records; nothing where they are none of ACCEPTED.

    A dialogue of n replies becomes n pairs, each with all that was said before as its prompt.
    """
    def text(name: str) -> str:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name!r} must be a text that is not empty")
        return row[name]
    keys = set(row)
    if isinstance(row.get("chosen"), list) and "rejected" in keys:
        return [compared_dialogues(row.get("prompt", []), row["chosen"], row["rejected"])]
    if "messages" in keys and not {"chosen", "rejected"} <= keys:
        return pairs_of_dialogue(row["messages"])
    if isinstance(row.get("prompt"), list) and not {"chosen", "rejected"} <= keys:
        return [asked_dialogue(row["prompt"], row.get("completion", row.get("response")))]
    if {"instruction", "output"} <= keys:
        more = f"\n\n{text('input')}" if str(row.get("input") or "").strip() else ""
        return [{"prompt": text("instruction") + more + "\n", "response": text("output")}]
    if {"chosen", "rejected"} <= keys and "prompt" not in keys:
        return [common_prompt(text("chosen"), text("rejected"))]
    for names in (("text",), ("prompt", "chosen", "rejected"), ("prompt", "response"),
                  ("prompt", "completion"), ("prompt",)):
        if set(names) <= keys:
            return [{name.replace("completion", "response"): text(name) for name in names}]
    return []


def pairs_of_dialogue(messages) -> list[dict[str, str]]:
    """[{"role": "user", "content": "Hello"}, ...] -> a pair for every reply of the assistant."""
    said, pairs = "", []
    for message in messages if isinstance(messages, list) else [messages]:
        message = message if isinstance(message, dict) else {}
        role, content = message.get("role"), message.get("content")
        if role not in [*TURN] or not isinstance(content, str):
            raise ValueError("'messages' must be a list of objects with role and content, a text; "
                             f"a role being one of {', '.join(TURN)}")
        if role == "assistant":
            reply = " " + content if content.strip() else ""            # of which no stage learns
            pairs.append({"prompt": said + TURN[role].rstrip(" "), "response": reply})
        said += TURN[role] + content
    if not pairs:
        raise ValueError("'messages' holds no reply of the assistant")
    return pairs


def asked_dialogue(prompt: list, completion: list | str | None) -> dict[str, str]:
    """A prompt that is a list of messages, as TRL has it; the reply is a second list, a text, or missing."""
    reply = completion or ""
    replies = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
    pair = pairs_of_dialogue(prompt + replies)[-1]
    return {name: text for name, text in pair.items() if text}


def compared_dialogues(prompt: list | str, chosen: list, rejected: list) -> dict[str, str]:
    """Lists of messages that differ in their last reply; what they share may stand in `prompt`. One that is a
    text is the first question, which UltraFeedback's lists hold once more.
    """
    if isinstance(prompt, str):
        asked = any(isinstance(message, dict) and message.get("role") == "user" for message in chosen)
        prompt = [] if asked else [{"role": "user", "content": prompt}]
    if not all(isinstance(messages, list) for messages in (prompt, rejected)):
        raise ValueError("'chosen' is a list of messages; 'rejected' and a 'prompt' must be too")
    better, worse = (pairs_of_dialogue(prompt + replies)[-1] for replies in (chosen, rejected))
    if better["prompt"] != worse["prompt"]:
        raise ValueError("'chosen' and 'rejected' must be one dialogue with two last replies")
    return {"prompt": better["prompt"], "chosen": better["response"], "rejected": worse["response"]}


def common_prompt(chosen: str, rejected: str) -> dict[str, str]:
    """Two dialogues that differ in their last reply, as hh-rlhf has them (Bai et al. 2022). A few there part
    earlier: then the prompt ends where they part, and what follows is compared. An empty chosen reply is no
    comparison.
    """
    turn = TURN["assistant"].rstrip(" ")
    shared = os.path.commonprefix([chosen, rejected])
    if turn not in shared:
        raise ValueError("'chosen' and 'rejected' must be one dialogue with two last replies after "
                         f"{turn.strip()!r}; or give the prompt by itself")
    at = shared.rfind(turn) + len(turn)
    reply = chosen[at:] if chosen[at:].strip() else ""
    return {"prompt": chosen[:at], "chosen": reply, "rejected": rejected[at:]}


def is_held_out(name: str) -> bool:
    """One name in twenty belongs to the evaluation set, in every stage and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20 == 0


def split(records: list[Record], kept: set[str] = frozenset()) -> tuple[list[Record], list[Record]]:
    """(training, held out): no name occurs in both. kept: the held-out names that an earlier stage wrote
    down.

    Where the rule leaves nothing on one side (a handful of records), the last tenth of the names is held out.
    """
    names = list(dict.fromkeys(record.name for record in records))
    held = {name for name in names if name in kept or is_held_out(name)}
    if len(names) > 1 and len(held) in (0, len(names)):
        held = kept & set(names) | set(names[-max(1, len(names) // 10):])
    return [r for r in records if r.name not in held], [r for r in records if r.name in held]


def names_of(records: list[Record]) -> set[str]:
    return {record.name for record in records}
