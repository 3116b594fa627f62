"""Draw the images that only the site uses: the icon of its tabs, and the card beside links to it.

`python tools/draw_site_images.py` writes `nbs/images/favicon.svg` and `nbs/images/card.png`.
"""
import io
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

images = Path(__file__).resolve().parent.parent/'nbs'/'images'
blue, ground, mask, new = '#2780e3', '#14202e', '#3c4d61', '#ff8a80'

# One arrow there and one back, for a network that can be run backwards
favicon = f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="6" fill="{blue}"/>
<path d="M6 11h17M18 5.5l6 5.5-6 5.5M26 21H9M14 15.5L8 21l6 5.5"
 fill="none" stroke="#fff" stroke-width="2.6"/>
</svg>
'''

sentence = 'masks become words, a few at a time'
words = sentence.split(' ')
letters = dict(ha='center', va='center', family='monospace', size=26)
revealed = [0, 3, 1, 6, 5, 2, 4, 7]    # Words in the order of their appearance

def draw_sentence(ax, y, n_old, n_new, width):
    "Write the sentence on one line: new words in another colour, masks for those that have not appeared"
    x = 0.
    for place, word in enumerate(words):
        if revealed.index(place) < n_old + n_new:
            colour = new if revealed.index(place) >= n_old else 'white'
            for i, letter in enumerate(word):
                ax.text(x + (i+.5)*width, y, letter, color=colour, **letters)
        else:
            ax.add_patch(Rectangle((x, y-.06), len(word)*width, .12, color=mask, lw=0))
        x += (len(word)+1)*width

def draw_card(path):
    "Draw the card: name, what it is, and a sentence that appears in four steps"
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=ground)
    fig.text(.07, .77, 'bijdiff', color='white', size=66, weight='bold')
    fig.text(.07, .65, 'Text by discrete diffusion, with a transformer', color='#c9d6e4', size=25)
    fig.text(.07, .57, 'that can be run backwards', color='#c9d6e4', size=25)
    ax = fig.add_axes([.07, .05, .86, .45])
    ax.set_axis_off()
    for row, (n_old, n_new) in enumerate([(0, 0), (0, 3), (3, 3), (6, 2)]):
        draw_sentence(ax, .9 - .26*row, n_old, n_new, 1/len(sentence))
    drawn = io.BytesIO()
    fig.savefig(drawn)
    plt.close(fig)
    Image.open(drawn).convert('RGB').quantize(32).save(path, optimize=True)

if __name__ == '__main__':
    (images/'favicon.svg').write_text(favicon)
    draw_card(images/'card.png')
