"""The networks of waifu2x-chainer's snapshots, as far as running them goes: `waifu2x.py:UpConv7`, `waifu2x.py:VGG7`."""

# mypy: ignore-errors
# Chainer has no types.

import chainer
import chainer.functions as F
import chainer.links as L


class UpConv7(chainer.Chain):
    """Twice as large: (n, 3, h, w) -> (n, 3, 2 h - 28, 2 w - 28), from 0 to 1."""

    WIDTHS = (3, 16, 32, 64, 128, 256, 256)

    def __init__(self):
        super().__init__()
        with self.init_scope():
            for i in range(6):
                setattr(self, f"conv{i + 1}", L.Convolution2D(self.WIDTHS[i], self.WIDTHS[i + 1], 3))
            self.conv7 = L.Deconvolution2D(256, 3, 4, 2, 3, nobias=True)

    def forward(self, x):
        for i in range(6):
            x = F.leaky_relu(self[f"conv{i + 1}"](x), 0.1)
        return self.conv7(x)


class VGG7(chainer.Chain):
    """Less noise, on luma alone: (n, 1, h, w) -> (n, 1, h - 14, w - 14), from 0 to 1."""

    WIDTHS = (1, 32, 32, 64, 64, 128, 128, 1)

    def __init__(self):
        super().__init__()
        with self.init_scope():
            for i in range(7):
                setattr(self, f"conv{i + 1}", L.Convolution2D(self.WIDTHS[i], self.WIDTHS[i + 1], 3))

    def forward(self, x):
        for i in range(6):
            x = F.leaky_relu(self[f"conv{i + 1}"](x), 0.1)
        return self.conv7(x)
