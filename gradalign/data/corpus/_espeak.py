"""A program that speaks one text with eSpeak NG: what the library says depends on what its process said before.

Arguments: ``LIBRARY DATA VOICE speak WORDS_PER_MINUTE PITCH``, which writes the rate as text, a line feed and the
samples (16 bit), or ``LIBRARY DATA VOICE phonemes``, which writes the text in the International Phonetic Alphabet. The
text is read from the standard input. Only the standard library is imported, so that it starts in a few milliseconds.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def main(library_path: str, data_path: str, voice: str, action: str, *settings: str) -> None:
    """Do what the arguments say; exit with a message when the library does not start or has no such voice."""
    library = ctypes.CDLL(library_path)
    pieces: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    # 2: deliver the samples to the callback before espeak_Synth returns.
    rate = library.espeak_Initialize(2, 0, data_path.encode(), 0)
    if rate <= 0:
        sys.exit(f"eSpeak NG did not start (espeak_Initialize returned {rate})")
    # It starts from the time of day otherwise.
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit(f"eSpeak NG has no voice {voice}")
    text = sys.stdin.buffer.read()
    # In both calls 1 says that the text is UTF-8.
    if action == "phonemes":
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest, clauses = ctypes.c_char_p(text), []
        # One clause a call, until nothing is left; 2: phonemes in IPA.
        while rest.value is not None:
            clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 2))
        sys.stdout.buffer.write(b", ".join(filter(None, clauses)) + b".")
        return
    library.espeak_SetSynthCallback(collect)
    # Parameter 1: words a minute; 3: pitch, 0 to 100.
    for parameter, value in zip((1, 3), settings, strict=True):
        library.espeak_SetParameter(parameter, int(value), 0)
    library.espeak_Synth(text, len(text) + 1, 0, 0, 0, 1, None, None)
    sys.stdout.buffer.write(f"{rate}\n".encode() + b"".join(pieces))


if __name__ == "__main__":
    main(*sys.argv[1:])
