"""Small packages of documentation in several languages, laid out as distributions do."""

import gzip
import html

NOUNS = {
    "en": ("table", "picture", "border", "footnote", "heading", "formula", "bookmark", "chapter"),
    "el": ("πίνακα", "εικόνας", "περιγράμματος", "υποσημείωσης", "επικεφαλίδας", "τύπου", "σελιδοδείκτη", "κεφαλαίου"),
    "tr": ("tablonun", "resmin", "kenarlığın", "dipnotun", "başlığın", "formülün", "yer iminin", "bölümün"),
}
SENTENCES = {
    "en": (
        "This dialog opens when you click the {0} with the right mouse button, and it shows all of its settings.",
        "Choose the width and the height of the {0} in the first list, then type the distance to the text.",
        "If the {0} is on the last page of the document, it is moved to the next page as soon as you add new lines.",
        "To remove the {0} again, select it and press the delete key, or undo the last command in the menu.",
    ),
    "el": (
        "Αυτός ο διάλογος ανοίγει όταν κάνετε δεξί κλικ στο αντικείμενο του {0} και εμφανίζει όλες τις ρυθμίσεις του.",
        "Επιλέξτε το πλάτος και το ύψος του {0} στην πρώτη λίστα και πληκτρολογήστε την απόσταση από το κείμενο.",
        "Αν το αντικείμενο του {0} είναι στην τελευταία σελίδα, μεταφέρεται στην επόμενη όταν προσθέτετε γραμμές.",
        "Για να αφαιρέσετε το αντικείμενο του {0}, επιλέξτε το και πατήστε το πλήκτρο διαγραφής.",
    ),
    "tr": (
        "Bu iletişim penceresi, {0} üzerine sağ fare düğmesiyle tıkladığınızda açılır ve tüm ayarlarını gösterir.",
        "İlk listeden {0} genişliğini ve yüksekliğini seçin, sonra çevresindeki metne olan uzaklığı yazın.",
        "Belgenin son sayfasındaki {0} yeri, yeni satırlar eklediğinizde hemen bir sonraki sayfaya taşınır.",
        "Yeniden kaldırmak için {0} seçimini yapıp silme tuşuna basın ya da menüden son komutu geri alın.",
    ),
}  # fmt: skip
NOTE = {
    "en": "You can find more about this in the chapter on the general settings of the office suite.",
    "el": "Περισσότερα για αυτό μπορείτε να βρείτε στο κεφάλαιο για τις γενικές ρυθμίσεις της σουίτας γραφείου.",
    "tr": "Bununla ilgili daha fazla bilgiyi ofis paketinin genel ayarları bölümünde bulabilirsiniz.",
}
UNTRANSLATED = "Press the key twice to see the name of the {0} in the status bar of the main window."


def texts(language, page):
    return [each.format(NOUNS[language][page]) for each in SENTENCES[language]]


def write_help(root, codes=("en-US", "el", "tr"), untranslated=("hi",)):
    """LibreOffice's help: eight pages of one book in each language; `untranslated` languages are English throughout.

    Every page has code, a note that all pages share, and a paragraph that is English in all languages.
    """
    for code in (*codes, *untranslated):
        language = "en" if code in untranslated else code[:2]
        for page in range(len(NOUNS["en"])):
            parts = [f'<p id="par_id{page}{n}">{html.escape(text)}</p>' for n, text in enumerate(texts(language, page))]
            parts.insert(1, f'<div class="embedded"><p id="par_note">{NOTE[language]}</p></div>')
            parts.insert(3, f'<p id="par_en{page}">{UNTRANSLATED.format(NOUNS["en"][page])}</p><pre>Dim x{page}</pre>')
            path = root / f"usr/share/libreoffice/help/{code}/text/swriter/page{page}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            body = f'<a name="x"></a><h1 id="hd_id{page}">Title</h1>{"".join(parts)}'
            path.write_text(f'<html><body><div id="DisplayArea">{body}</div></body></html>', "utf-8")
    return root


def write_man(root, name, language, blocks):
    """A page of section 1 whose blocks are paragraphs with fonts, a comment, and code."""
    lines = ['.\\" comment', f'.TH {name.upper()} 1 "today"', ".SH NAME"]
    for text in blocks:
        first, _, rest = text.partition(" ")
        lines += [".PP", f".B {first}", rest.replace("-", "\\-"), ".nf", "code here", ".fi"]
    path = root / "usr/share/man" / ("" if language == "en" else language) / f"man1/{name}.1.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def write_reference(root, language, blocks):
    parts = "".join(f"<p>{html.escape(each)}</p>" for each in blocks)
    path = root / f"usr/share/debian-reference/ch01.{language}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<html><body><h2><a id="_shell"/>1.1. Shell</h2>{parts}</body></html>', "utf-8")
