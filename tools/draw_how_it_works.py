"""Draw the picture of the README that shows how bijdiff works: `python tools/draw_how_it_works.py`."""
from pathlib import Path
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PLACE = Path(__file__).resolve().parent.parent/'nbs'/'images'/'how_it_works.png'
INK, BLUE, RED, GREY = '#1b1f24', '#2f6fb0', '#b5482f', '#c9ced6'
WORDS = 'She opened the door and looked'.split()
WIDTHS = [.9, 1.35, .75, .95, .75, 1.25]
STEPS = [(1., ()), (.6, (1, 3)), (.3, (0, 1, 3, 4)), (0., range(6))]

def box(ax, x, y, width, height, text, face, ink=INK):
    "Draw a box with rounded corners around a text"
    corners = 'round,pad=0,rounding_size=.12'
    shape = FancyBboxPatch((x, y), width, height, boxstyle=corners, fc=face, ec='none')
    ax.add_patch(shape)
    ax.text(x+width/2, y+height/2, text, ha='center', va='center', color=ink, fontsize=11)

def arrow(ax, start, end, colour=INK):
    "Draw an arrow"
    style = dict(arrowstyle='-|>', mutation_scale=12, lw=1.4, color=colour, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(start, end, **style))

def draw_writing(ax):
    "Draw a sequence that is unmasked in three steps"
    ax.set_title('Writing: masks become tokens', fontsize=12, color=INK)
    for row,(t, known) in enumerate(STEPS):
        x,y = .9,3-row
        ax.text(0, y+.3, f't = {t:g}', va='center', color=INK, fontsize=11)
        for i,(word, width) in enumerate(zip(WORDS, WIDTHS)):
            face = '#d9e6f4' if i in known else GREY
            box(ax, x, y, width, .6, word if i in known else '', face)
            x += width+.12
        if row: ax.text(x+.1, y+.8, 'network', color=BLUE, fontsize=9, va='center')
        if row: arrow(ax, (x+.05, y+1.1), (x+.05, y+.5), BLUE)
    ax.set(xlim=(-.1, 8.7), ylim=(-.3, 4))

def draw_block(ax, left, title, sign, colour, ends):
    "Draw a block, downwards, or its inverse, upwards: one stream changes by a function of the other"
    ax.text(left+1.6, 3.72, title, ha='center', color=colour, fontsize=11)
    for x,above,below in ((left, 'x₁', 'y₂'), (left+2.4, 'x₂', 'y₁')):
        box(ax, x, 3, .8, .5, above, GREY)
        box(ax, x, 0, .8, .5, below, GREY)
    start,end = ends
    gap = .2 if end<start else -.2
    arrow(ax, (left+.4, start), (left+.4, 1.75+gap))
    arrow(ax, (left+.4, 1.75), (left+.4, end))
    arrow(ax, (left+2.8, start), (left+2.8, end))
    arrow(ax, (left+2.8, 1.75), (left+2.4, 1.75), colour)
    box(ax, left+1.15, 1.5, 1.25, .5, 'round(f(·))', '#f3ddd6' if sign=='+' else '#d9e6f4')
    arrow(ax, (left+1.15, 1.75), (left+.62, 1.75), colour)
    ax.text(left+.4, 1.75, sign, ha='center', va='center', color=colour, fontsize=14,
            bbox=dict(boxstyle='circle,pad=.12', fc='white', ec=colour))

def draw_layer(ax):
    "Draw a block and its inverse"
    ax.set_title('A block, and its inverse to the last bit', fontsize=12, color=INK)
    draw_block(ax, 0, 'forward', '+', RED, (2.95, .55))
    draw_block(ax, 4.1, 'inverse', '−', BLUE, (.55, 2.95))
    under = dict(ha='center', va='center', color=INK, fontsize=10.5)
    ax.text(1.6, -.35, 'y₁ = x₂    y₂ = x₁ + round(f(x₂))', **under)
    ax.text(5.7, -.35, 'x₂ = y₁    x₁ = y₂ − round(f(y₁))', **under)
    ax.set(xlim=(-.2, 7.5), ylim=(-.55, 4))

def draw():
    "Draw both parts and save them"
    fig,axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1.1, 1), layout='constrained')
    draw_writing(axes[0])
    draw_layer(axes[1])
    for ax in axes: ax.axis('off')
    fig.savefig(PLACE, dpi=110)

if __name__=='__main__': draw()
