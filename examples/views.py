"""Other views than RawBoost: telephone, room and noise by torchaudio, and any transform of torch-audiomentations.

    pip install torchaudio torch-audiomentations
    python examples/views.py

A view is any function (wave [B, T], seeds int64 [B]) -> [B, T]. Draws that follow from the utterance's own seed are the
same in every batch and after every resume. `gradalign train` takes views by name, as many as wanted:

    PYTHONPATH=examples gradalign train run.yaml 'views=[clean, rawboost, "views:telephone", "views:room"]'
"""

import math

import torch
import torchaudio.functional as audio

import gradalign as ga

SAMPLE_RATE = 16000


def each(draw, seeds):
    """Stack ``draw(generator)`` for the generator of each utterance's seed."""
    return torch.stack([draw(torch.Generator().manual_seed(seed)) for seed in seeds.tolist()])


def telephone(wave, seeds):
    """Simulate a telephone: 300 to 3400 Hz at 8 kHz, 8-bit mu-law; it draws nothing."""
    narrow = audio.resample(wave, SAMPLE_RATE, 8000)
    narrow = audio.lowpass_biquad(audio.highpass_biquad(narrow, 8000, 300.0), 8000, 3400.0)
    decoded = audio.mu_law_decoding(audio.mu_law_encoding(narrow.clamp(-1, 1), 256), 256)
    return audio.resample(decoded, 8000, SAMPLE_RATE)[:, : wave.shape[1]]


def room(wave, seeds):
    """Simulate a room: the direct sound and noise that falls by 60 dB within 0.1 to 0.6 s."""
    taps = SAMPLE_RATE * 6 // 10
    time = torch.arange(taps) / SAMPLE_RATE

    def response(generator):
        reverberation = 0.1 + 0.5 * torch.rand((), generator=generator)
        tail = torch.randn(taps, generator=generator) * torch.exp(-3 * math.log(10) * time / reverberation)
        tail[0] = 0
        tail *= 0.5 / tail.norm()
        tail[0] = 1
        return tail

    return audio.fftconvolve(wave, each(response, seeds).to(wave))[:, : wave.shape[1]]


def noise(wave, seeds):
    """Add white noise at 5 to 25 dB of signal-to-noise ratio."""
    white = each(lambda g: torch.randn(wave.shape[1], generator=g), seeds).to(wave)
    snr = each(lambda g: 5 + 20 * torch.rand((), generator=g), seeds).to(wave)
    return audio.add_noise(wave, white, snr)


def audiomentations(wave, seeds):
    """Apply transforms of torch-audiomentations. They draw from PyTorch's own generator: one seed for the batch."""
    import torch_audiomentations as ta

    chain = ta.Compose(
        [
            ta.Gain(p=1.0, output_type="dict"),
            ta.BandPassFilter(p=0.5, sample_rate=SAMPLE_RATE, output_type="dict"),
        ],
        output_type="dict",
    )
    with torch.random.fork_rng(devices=[wave.device] if wave.is_cuda else []):
        torch.manual_seed(int(seeds.sum()) % 2**63)
        return chain(wave[:, None], sample_rate=SAMPLE_RATE).samples[:, 0]


def main() -> ga.AlignedOptimizer:
    """Take four steps on six views of two utterances and return the optimizer."""
    torch.manual_seed(0)
    model = ga.detectors.create("light")
    boost = ga.RawBoost(algo=4)
    criterion = torch.nn.CrossEntropyLoss()
    views = [lambda wave, seeds: wave, lambda wave, seeds: boost(wave, seeds=seeds), telephone, room, noise]
    views.append(audiomentations)
    optimizer = ga.AlignedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), method="pcgrad")
    wave, labels = 0.1 * torch.randn(2, 2 * SAMPLE_RATE), torch.tensor([0, 1])
    for step in range(4):
        seeds = torch.tensor([2 * step, 2 * step + 1])
        optimizer.zero_grad()
        for view in views:
            with optimizer.path():
                criterion(model(view(wave, seeds)), labels).backward()
        optimizer.step()
    return optimizer


if __name__ == "__main__":
    print(main().stats)
