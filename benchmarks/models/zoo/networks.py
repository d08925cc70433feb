"""The zoo's networks, in Chainer, as a user would have them in a file. Classes come out as logits."""

# mypy: ignore-errors
# Chainer has no types.

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np


class Dense(chainer.Chain):
    """A perceptron: (n, 64) -> (n, 10)."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(64, 256)
            self.l2 = L.Linear(256, 128)
            self.l3 = L.Linear(128, 10)

    def forward(self, x):
        return self.l3(F.relu(self.l2(F.relu(self.l1(x)))))


class Norm(chainer.Chain):
    """A convolution without bias, and batch norm."""

    def __init__(self, inputs, outputs, ksize=1, stride=1, groups=1):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(inputs, outputs, ksize, stride, ksize // 2, nobias=True, groups=groups)
            self.bn = L.BatchNormalization(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class Block(chainer.Chain):
    """Two convolutions and a way around them, which is a convolution too where the shape changes."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        with self.init_scope():
            self.a = Norm(inputs, outputs, 3, stride)
            self.b = Norm(outputs, outputs, 3)
            self.around = F.identity if (inputs, stride) == (outputs, 1) else Norm(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x))) + self.around(x))


class Residual(chainer.Chain):
    """A small ResNet: (n, 1, 16, 16) -> (n, 10)."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.stem = Norm(1, 12, 3)
            self.block1 = Block(12, 12)
            self.block2 = Block(12, 20, stride=2)
            self.head = L.Linear(20, 10)

    def forward(self, x):
        h = self.block2(self.block1(F.relu(self.stem(x))))
        return self.head(F.mean(h, axis=(2, 3)))


def hard_swish(x):
    return x * F.hard_sigmoid(x)


class Gated(chainer.Chain):
    """An inverted bottleneck with squeeze and excitation, as in MobileNet V3."""

    def __init__(self, inputs, wide, outputs, stride=1):
        super().__init__()
        self.shortcut = (inputs, stride) == (outputs, 1)
        with self.init_scope():
            self.expand = Norm(inputs, wide)
            self.depthwise = Norm(wide, wide, 3, stride, groups=wide)
            self.squeeze = L.Linear(wide, wide // 4)
            self.excite = L.Linear(wide // 4, wide)
            self.project = Norm(wide, outputs)

    def forward(self, x):
        h = hard_swish(self.depthwise(hard_swish(self.expand(x))))
        gate = F.sigmoid(self.excite(F.relu(self.squeeze(F.mean(h, axis=(2, 3))))))
        h = self.project(h * F.broadcast_to(F.expand_dims(F.expand_dims(gate, 2), 3), h.shape))
        return h + x if self.shortcut else h


class Excitation(chainer.Chain):
    """A small MobileNet V3: (n, 1, 16, 16) -> (n, 10)."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.stem = Norm(1, 12, 3)
            self.block1 = Gated(12, 32, 24, stride=2)
            self.block2 = Gated(24, 64, 24)
            self.top = Norm(24, 64)
            self.head = L.Linear(64, 10)

    def forward(self, x):
        h = self.block2(self.block1(hard_swish(self.stem(x))))
        h = hard_swish(self.top(h))
        return self.head(F.reshape(F.average_pooling_2d(h, h.shape[2:]), (-1, 64)))


class TextLSTM(chainer.Chain):
    """Numbers of characters, (n, t) -> (n · t, characters): which one comes next, at every place."""

    def __init__(self, characters=40, embedding=16, hidden=40):
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(characters, embedding)
            self.lstm = L.NStepLSTM(1, embedding, hidden, dropout=0)
            self.head = L.Linear(hidden, characters)

    def forward(self, x):
        _, _, states = self.lstm(None, None, list(F.separate(self.embed(x), axis=0)))
        return self.head(F.concat(states, axis=0))


class Attending(chainer.Chain):
    """A transformer's layer, normalized ahead of attention and of the two dense layers."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.heads = heads
        with self.init_scope():
            self.norm1 = L.LayerNormalization(width)
            self.query = L.Linear(width, width)
            self.key = L.Linear(width, width)
            self.value = L.Linear(width, width)
            self.out = L.Linear(width, width)
            self.norm2 = L.LayerNormalization(width)
            self.up = L.Linear(width, inner)
            self.down = L.Linear(inner, width)

    def forward(self, x, tokens):
        """`x` is (n · tokens, width), and so is the result."""
        width = x.shape[1]
        h = self.norm1(x)
        q, k, v = (
            F.transpose(F.reshape(layer(h), (-1, tokens, self.heads, width // self.heads)), (0, 2, 1, 3))
            for layer in (self.query, self.key, self.value)
        )
        weights = F.softmax(F.matmul(q, k, transb=True) / np.float32((width // self.heads) ** 0.5), axis=3)
        x = x + self.out(F.reshape(F.transpose(F.matmul(weights, v), (0, 2, 1, 3)), (-1, width)))
        h = self.up(self.norm2(x))
        return x + self.down(h * (1 + F.erf(h / np.float32(2**0.5))) / 2)


class Transformer(chainer.Chain):
    """Rows of a picture as tokens: (n, 8, 8) -> (n, 10)."""

    def __init__(self, width=64, inner=48, heads=4):
        super().__init__()
        with self.init_scope():
            self.embed = L.Linear(8, width)
            self.position = chainer.Parameter(chainer.initializers.Normal(0.1), (8, width))
            self.layer0 = Attending(width, inner, heads)
            self.layer1 = Attending(width, inner, heads)
            self.norm = L.LayerNormalization(width)
            self.head = L.Linear(width, 10)

    def forward(self, x):
        n, tokens, pixels = x.shape
        h = self.embed(F.reshape(x, (-1, pixels)))
        h = h + F.reshape(F.broadcast_to(self.position, (n, *self.position.shape)), h.shape)
        h = self.norm(self.layer1(self.layer0(h, tokens), tokens))
        return self.head(F.mean(F.reshape(h, (n, tokens, -1)), axis=1))


class Upscaler(chainer.Chain):
    """A U-Net that makes a grey picture twice as large: (n, 1, h, w) -> (n, 1, 2 h, 2 w), from 0 to 1."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Convolution2D(1, 12, 3, pad=1)
            self.down = L.Convolution2D(12, 20, 4, stride=2, pad=1)
            self.deep = L.Convolution2D(20, 20, 3, pad=1)
            self.up = L.Deconvolution2D(20, 12, 4, stride=2, pad=1)
            self.joined = L.Convolution2D(24, 12, 3, pad=1)
            self.last = L.Deconvolution2D(13, 1, 4, stride=2, pad=1)
        # It starts as what interpolates the small picture linearly.
        slope = np.array([0.25, 0.75, 0.75, 0.25], np.float32)
        self.last.W.array[:] *= 0.1
        self.last.W.array[12, 0] = np.outer(slope, slope)

    def forward(self, x):
        left = F.relu(self.first(x))
        h = F.relu(self.deep(F.relu(self.down(left))))
        h = F.relu(self.joined(F.concat((F.relu(self.up(h)), left))))
        picture = self.last(F.concat((h, x)))
        # Where it is cut off, nothing would be learnt.
        return picture if chainer.config.train else F.clip(picture, 0.0, 1.0)
