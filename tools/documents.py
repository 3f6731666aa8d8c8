"""Make the handbook's PDF and DOCX documents: pages to print or to hand on, and real input for ingestion.

python -m tools.documents    # write examples/handbook/{operations-checklist.pdf,security-questionnaire.docx}
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from docx import Document
from docx.shared import Pt
from fpdf import FPDF, FontFace

HANDBOOK = Path(__file__).resolve().parents[1] / "examples" / "handbook"
CHECKLIST_FILE = HANDBOOK / "operations-checklist.pdf"
QUESTIONNAIRE_FILE = HANDBOOK / "security-questionnaire.docx"
_MADE = datetime(2026, 11, 1, tzinfo=UTC)  # constant, so that the same text gives the same file

CHECKLIST_TITLE = "Operations checklist"
CHECKLIST = {
    "Before the first user": (
        "Choose a state folder on a disk of its own and set PLEXUS_STATE for the service account.",
        "Put a reverse proxy with TLS in front of the edge; publish no other port.",
        "Remove the consumers demo and admin from the gateway file and add one consumer for each program.",
        "Note the fingerprint of the certificate authority in the operations log.",
        "Let plexus doctor run once as the service account and keep its output.",
    ),
    "Every day": (
        "Read plexus status: every process is serving, and no restart counter has grown since yesterday.",
        "Look at the dead letters of every subscription; an old dead letter needs an owner.",
        "Compare the free space of the state folder with yesterday's; act below twice a week's growth.",
    ),
    "Every month": (
        (
            "Hold the restore drill on the first Tuesday: restore the newest backup to a spare state "
            "folder, start it on port 8009, and ask it three questions whose answers are known."
        ),
        "Replace the key of every consumer that has not been replaced for ninety days.",
        "Read the list of consumers with its owners, and remove those that nobody claims.",
    ),
    "Before an upgrade": (
        "Read the changelog from the running version on.",
        "Stop Plexus and copy the state folder; keep the copy for two weeks.",
        (
            "Start the new version on the copy first, with another port, and run the checks of the "
            "restore drill."
        ),
    ),
    "When something is wrong": (
        "Write down the request id from the answer before anything else; it leads to every log line.",
        "Do not delete the state folder to get rid of an error: copy it, then look.",
        "A process in a crash loop: read its log from the first restart on, not from the last.",
        "The disk is full: reading and deleting still work; free space, nothing needs a restart.",
    ),
}

QUESTIONNAIRE_TITLE = "Security questionnaire"
QUESTIONNAIRE_INTRODUCTION = (
    "Answers to what security reviewers ask most often about Plexus. They describe the embedded "
    "version on one machine; whoever operates it adds what holds for the organisation."
)
QUESTIONNAIRE = (
    (
        "Where is the data kept?",
        "In one folder on the machine where Plexus runs. Nothing leaves that machine.",
    ),
    (
        "Is ingested data used to train models?",
        (
            "No. The models are fixed files with known checksums; Plexus has no code that trains or "
            "adapts a model, and sends no document, question or answer to anybody."
        ),
    ),
    (
        "Does the product call home?",
        (
            "No. There is no telemetry to the makers, no licence check and no update check. Traces "
            "are exported only to the collector that the operator configures."
        ),
    ),
    (
        "How is data encrypted in transit?",
        (
            "Between processes with mutual TLS 1.2 or newer and certificates that live one day. "
            "Between clients and the edge by the reverse proxy that the operator puts in front of it."
        ),
    ),
    (
        "How is data encrypted at rest?",
        (
            "Plexus does not encrypt files itself. Use an encrypted file system for the state folder "
            "and for its backups."
        ),
    ),
    (
        "How are users authenticated?",
        (
            "By JSON Web Tokens of consumers. Plexus keeps no passwords and no personal accounts; a "
            "program that has users maps them to consumers."
        ),
    ),
    (
        "How is a person's data erased?",
        (
            "Deleting a document removes its text, vectors, index entries and original. The space is "
            "reused; backups keep the document until they are deleted, so their lifetime is the upper"
            " bound for an erasure."
        ),
    ),
    (
        "Which data do logs contain?",
        (
            "Names of resources, methods, status codes, durations, identities and request ids. Never "
            "the content of documents, messages, questions or answers, and never tokens."
        ),
    ),
    (
        "Who can administer the system?",
        "Whoever can read the state folder. There is no remote administration and no default password.",
    ),
    (
        "How are vulnerabilities handled?",
        (
            "Every dependency is pinned with its hash, so it is known which versions run. Report what"
            " you find to the maintainers in private, with the version and the steps."
        ),
    ),
)


def checklist(target: Path) -> None:
    """Write the checklist as a PDF of one page."""
    page = FPDF(format="A4")
    page.set_creation_date(_MADE)
    page.set_title(f"Plexus: {CHECKLIST_TITLE.lower()}")
    page.set_margins(20, 15)
    page.set_auto_page_break(auto=True, margin=12)
    page.add_page()
    page.set_font("Helvetica", "B", 20)
    page.cell(text=f"Plexus: {CHECKLIST_TITLE.lower()}", new_x="LMARGIN", new_y="NEXT")
    page.set_font("Helvetica", size=9.5)
    page.ln(1)
    page.multi_cell(0, 5, "One page to print. The handbook has the reasons.", new_x="LMARGIN", new_y="NEXT")
    for heading, items in CHECKLIST.items():
        page.ln(2.5)
        page.set_font("Helvetica", "B", 12)
        page.cell(h=7, text=heading, new_x="LMARGIN", new_y="NEXT")
        page.set_font("Helvetica", size=9.5)
        with page.table(
            borders_layout="NONE",
            col_widths=(5, 165),
            line_height=5,
            first_row_as_headings=False,
            headings_style=FontFace(),
        ) as table:
            for item in items:
                row = table.row()
                row.cell("[ ]")
                row.cell(item)
    page.output(str(target))


def questionnaire(target: Path) -> None:
    """Write the questionnaire as a DOCX with one heading for each question."""
    document = Document()
    document.styles["Normal"].font.size = Pt(11)
    document.core_properties.title = f"Plexus: {QUESTIONNAIRE_TITLE.lower()}"
    document.core_properties.author = "Plexus"
    document.core_properties.created = document.core_properties.modified = _MADE.replace(tzinfo=None)
    document.add_heading(f"Plexus: {QUESTIONNAIRE_TITLE.lower()}", level=0)
    document.add_paragraph(QUESTIONNAIRE_INTRODUCTION)
    for question, answer in QUESTIONNAIRE:
        document.add_heading(question, level=2)
        document.add_paragraph(answer)
    document.save(str(target))


if __name__ == "__main__":
    checklist(CHECKLIST_FILE)
    questionnaire(QUESTIONNAIRE_FILE)
    print(f"{CHECKLIST_FILE.name} and {QUESTIONNAIRE_FILE.name} written")
