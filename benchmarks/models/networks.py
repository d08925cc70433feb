"""The sample networks, in Chainer, as a user would have them in a file."""

# mypy: ignore-errors
# Chainer has no types.

import chainer
import chainer.functions as F
import chainer.links as L


class Generator(chainer.Chain):
    """The generator of a conditional DCGAN: (n, noise + 10) -> (n, 1, 28, 28), from 0 to 1.

    The input is noise, normally distributed, and then one number for each digit, a 1 and nine 0.
    """

    def __init__(self, noise=100):
        super().__init__()
        with self.init_scope():
            self.l0 = L.Linear(noise + 10, 128 * 3 * 3)
            self.dc1 = L.Deconvolution2D(128, 64, ksize=3, stride=2)
            self.dc2 = L.Deconvolution2D(64, 32, ksize=2, stride=2)
            self.dc3 = L.Deconvolution2D(32, 1, ksize=2, stride=2)
            self.bn1 = L.BatchNormalization(64)
            self.bn2 = L.BatchNormalization(32)

    def forward(self, x):
        h = F.reshape(F.relu(self.l0(x)), (-1, 128, 3, 3))
        h = F.relu(self.bn1(self.dc1(h)))
        h = F.relu(self.bn2(self.dc2(h)))
        return F.sigmoid(self.dc3(h))


class Discriminator(chainer.Chain):
    """What the generator learns against: images and their labels -> how real they look, as a logit."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.c1 = L.Convolution2D(1, 32, ksize=4, stride=2, pad=1)
            self.c2 = L.Convolution2D(32, 64, ksize=4, stride=2, pad=1)
            self.l3 = L.Linear(64 * 7 * 7, 128)
            self.l4 = L.Linear(128, 1)
            self.label = L.Linear(10, 128, nobias=True)

    def forward(self, images, labels):
        h = F.leaky_relu(self.c1(images))
        h = F.leaky_relu(self.c2(h))
        h = F.leaky_relu(self.l3(h))
        # A projection discriminator (Miyato and Koyama, ICLR 2018).
        return self.l4(h) + F.sum(self.label(labels) * h, axis=1, keepdims=True)


class UNet(chainer.Chain):
    """The generator of pix2pix (Isola et al., CVPR 2017): (n, 3, 256, 256) -> the same, from -1 to 1."""

    WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)

    def __init__(self):
        super().__init__()
        levels = range(len(self.WIDTHS))
        around = (3, *self.WIDTHS)  # how many channels there are above each level
        with self.init_scope():
            self.down = chainer.ChainList(*(L.Convolution2D(around[i], around[i + 1], 4, 2, 1) for i in levels))
            # The way up meets, at all levels but the deepest, what the way down has left there.
            self.up = chainer.ChainList(
                *(L.Deconvolution2D(around[i + 1] * (1 if i == levels[-1] else 2), around[i], 4, 2, 1) for i in levels)
            )
            self.down_bn = chainer.ChainList(*(L.BatchNormalization(around[i + 1]) for i in levels[1:-1]))
            self.up_bn = chainer.ChainList(*(L.BatchNormalization(around[i]) for i in levels[1:]))

    def forward(self, x):
        left = [self.down[0](x)]
        for down, bn in zip(list(self.down)[1:-1], self.down_bn, strict=True):
            left.append(bn(down(F.leaky_relu(left[-1]))))
        h = self.down[-1](F.leaky_relu(left[-1]))
        for up, bn in zip(list(self.up)[:0:-1], list(self.up_bn)[::-1], strict=True):
            h = F.concat((bn(up(F.relu(h))), left.pop()))
        return F.tanh(self.up[0](F.relu(h)))
