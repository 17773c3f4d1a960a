"""Make the vocabulary of visual words that names of features are taken from.

    python -m benchmarks.vocabulary --wordnet DIR

``DIR`` holds the database files of WordNet 3.0, as Debian's package ``wordnet-base`` puts them into
``/usr/share/wordnet`` (``apt-get download wordnet-base``, then ``dpkg -x``). Nouns come from there:
those whose first sense is something to be seen (an animal, a thing that people made, food, a plant,
a part of a body, a thing in nature, a shape, a substance, weather), and which are common,
as far as WordNet tells: a sense was met in its tagged texts, or the noun names a kind that has
kinds below it. Names of persons and places are left out. Words for people, colours, patterns,
looks, places and doings are our own, below.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

VOCABULARY = Path(__file__).parents[1] / "vision_plugin" / "lens" / "vocabulary.txt"
SEEN = {"05": 2, "06": 2, "08": 0, "13": 2, "17": 2, "19": 0, "20": 2, "25": 1, "27": 0}
"""WordNet's groups of nouns that can be seen; the number of kinds below a single word that make it
common where no text was tagged with it, 0 where that is never enough."""
OURS = """
red orange yellow green blue purple violet pink brown black white grey gold silver beige turquoise
cyan magenta crimson scarlet maroon navy teal olive lavender cream colourful pastel monochrome
bright dark pale shiny glossy matte transparent translucent blurry sharp sparkling glowing neon
striped dotted checked spotted plaid zigzag wavy floral geometric symmetric patterned plain mottled
grid lattice mosaic spiral swirl gradient texture smooth rough fuzzy furry fluffy hairy feathered
scaly spiky prickly wrinkled cracked rusty dusty muddy wet icy frozen snowy foggy cloudy sunny rainy
stormy smoky burnt broken torn folded crumpled metallic wooden leather plastic rubber glass paper
cardboard concrete brick stone marble ceramic woollen cotton silk denim lace knitted woven big small
tiny huge tall short long thin thick wide narrow round square triangular rectangular oval curved
straight pointed flat hollow open closed empty full crowded lonely old new ancient modern vintage
antique futuristic rustic elegant ornate minimalist messy tidy left right top bottom centre corner
edge foreground background close-up aerial underwater indoor outdoor silhouette shadow reflection
sunlight moonlight candlelight spotlight bokeh day night dawn dusk sunrise sunset spring summer
autumn winter photograph drawing sketch painting cartoon illustration diagram map chart icon logo
sign label text letter number word handwriting caption poster stamp sticker emoji clipart screenshot
happy sad angry surprised scared sleepy laughing crying smiling frowning shouting winking kissing
hugging holding running walking jumping sitting standing lying sleeping eating drinking cooking
reading writing drawing painting singing dancing playing swimming diving surfing sailing rowing
fishing hunting climbing skiing skating cycling riding driving flying falling throwing catching
kicking hitting fighting working building digging cutting pouring washing shopping travelling
celebrating praying thinking pointing waving clapping man woman boy girl baby child teenager adult
person people family couple crowd team doctor nurse teacher student judge police officer soldier
sailor pilot astronaut firefighter farmer gardener cook baker waiter butcher fisherman hunter cowboy
carpenter plumber electrician mechanic builder engineer scientist chemist artist painter musician
singer dancer actor clown magician photographer writer journalist athlete footballer boxer runner
swimmer cyclist skier rider driver king queen prince princess knight pirate ninja samurai wizard
witch fairy elf mermaid vampire zombie ghost angel devil monk nun priest bride groom detective spy
thief tourist shopkeeper businessman robot alien monster dragon unicorn skeleton male female young
elderly pair group row stack pile heap bunch line circle
"""

HEADER = """\
# Words for things that can be seen, to name features with: a word or two words a line.
# Made by benchmarks/vocabulary.py. Its nouns are taken from WordNet 3.0, the other words are ours.
#
# WordNet Release 3.0 This software and database is being provided to you, the LICENSEE, by
# Princeton University under the following license. By obtaining, using and/or copying this
# software and database, you agree that you have read, understood, and will comply with these terms
# and conditions.: Permission to use, copy, modify and distribute this software and database and
# its documentation for any purpose and without fee or royalty is hereby granted, provided that you
# agree to comply with the following copyright notice and statements, including the disclaimer, and
# that the same appear on ALL copies of the software, database and documentation, including
# modifications that you make for internal use or for distribution. WordNet 3.0 Copyright 2006 by
# Princeton University. All rights reserved. THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND
# PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF
# EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF
# MERCHANT-ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE OF THE LICENSED SOFTWARE,
# DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR
# OTHER RIGHTS. The name of Princeton University or Princeton may not be used in advertising or
# publicity pertaining to distribution of the software and/or database. Title to copyright in this
# software, database and any associated documentation shall at all times remain with Princeton
# University and LICENSEE agrees to preserve same.
"""


@dataclass(frozen=True)
class Config:
    """Where WordNet lies, and where the list goes."""

    wordnet: Path
    """Folder of WordNet's database files."""
    out: Path = VOCABULARY
    """File to write."""


def common_nouns(wordnet: Path) -> set[str]:
    """Return the common nouns for things that can be seen, without names."""
    group, kinds, written = {}, {}, {}
    for line in (wordnet / "data.noun").read_text().splitlines():
        if not line.startswith("  "):
            fields = line.split(" | ")[0].split()
            group[fields[0]], kinds[fields[0]] = fields[1], fields.count("~")
            written[fields[0]] = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    tagged = {
        key.partition("%")[0]
        for key, _, times in map(str.split, (wordnet / "cntlist.rev").read_text().splitlines())
        if "%1:" in key and int(times) > 0
    }
    found = set()
    for line in (wordnet / "index.noun").read_text().splitlines():
        fields = line.split()
        if line.startswith("  ") or not re.fullmatch(r"[a-z]{3,}([_-][a-z]{3,})?", fields[0]):
            continue
        first = fields[-int(fields[2])]
        if group[first] not in SEEN or fields[0] not in written[first]:  # names have capitals
            continue
        enough = SEEN[group[first]] if fields[0].isalpha() else 0
        if fields[0] in tagged or 0 < enough <= kinds[first]:
            found.add(fields[0].replace("_", " "))
    return found


def main(config: Config) -> None:
    """Write the list."""
    words = {*OURS.split(), *common_nouns(config.wordnet)}
    config.out.write_text(HEADER + "\n".join(sorted(words)) + "\n")
    sys.stdout.write(f"{len(words):,} words in {config.out}\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
