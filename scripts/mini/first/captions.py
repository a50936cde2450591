"""How the Unicode name of an emoji becomes a caption: rules here, exceptions in captions_tables.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

TABLES = json.loads((Path(__file__).parent / "captions_tables.json").read_text(encoding="utf-8"))


def article(phrase: str) -> str:
    """Return "a" or "an", by sound."""
    word = phrase.split()[0].lower()
    if re.match(r"(eight|eleven|hour|honest|heir|[aefilmnorsx](-|\b))", word):
        return "an"
    if re.match(r"(uni|use|usa|euro|ewe|one|ukul)", word):
        return "a"
    return "an" if word[0] in "aeiou" else "a"


def noun_phrase(label: str) -> str:
    """Put an article before a name, unless it is a plural or an uncountable noun."""
    words = label.lower().split()
    end = next((i for i, word in enumerate(words) if i and word in TABLES["prepositions"]), len(words))
    head = words[end - 1].replace("’s", "").split("-")[-1]
    in_s = head.endswith("s") and not head.endswith("ss") and head not in TABLES["singular_in_s"]
    uncountable = label.lower() in TABLES["no_article"] or head in TABLES["no_article"]
    return label if uncountable or in_s or head in TABLES["plural_heads"] else f"{article(label)} {label}"


def caption_text(label: str, subgroup: str) -> str:
    """Turn a Unicode name into a phrase: "red apple" into "a red apple"; `subgroup` is emojibase's."""
    if label in TABLES["phrases"]:
        return TABLES["phrases"][label]
    label = label.replace("’", "'").replace("“", "").replace("”", "").replace("ñ", "n")
    if subgroup == "zodiac":
        return f"the {label} zodiac sign"
    if found := re.match(r"(person|man|woman): (.*)$", label):
        who, what = found.groups()
        return {"bald": f"a bald {who}", "beard": f"a {who} with a beard"}.get(what, f"a {who} with {what}")
    found = re.match(r"(man|woman) (?!(?:in|with|wearing|feeding)\b)(.*)$", label)
    if found and subgroup in ("person-role", "person-fantasy"):
        return f"a {'male' if found[1] == 'man' else 'female'} {found[2]}"
    for short, word in {"1st": "first", "2nd": "second", "3rd": "third"}.items():
        label = re.sub(rf"^{short} place", f"{word} place", label)
    for capitals in ("gesturing NO", "gesturing OK", "OK hand"):
        label = label.replace(capitals, capitals.replace("NO", "no").replace("OK", "ok"))
    return noun_phrase(label)
